"""Scales in another dtype: what that moves is measured, and said."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from bitpress.errors import BitpressError

logger = logging.getLogger(__name__)


@dataclass
class Rounding:
    """Numbers of a grid brought to the dtype in which a format holds them.

    Attributes:
        dtype: that of the format.
        greatest: the greatest relative difference so far.
        where: the layer that has it.
    """

    dtype: torch.dtype
    greatest: float = 0.0
    where: str = ""

    def __call__(self, layer: str, numbers: Tensor) -> Tensor:
        """``numbers`` in the dtype.

        Raises:
            BitpressError: one is too great or too small for it; names the layer.
        """
        rounded = numbers.to(self.dtype)
        if torch.equal(rounded.to(numbers.dtype), numbers):
            return rounded
        off = ((rounded.double() - numbers.double()) / numbers.double()).abs().nan_to_num_(0.0)
        moved = float(off.max())
        if not moved < 1.0:
            worst = float(numbers.flatten()[off.argmax()])
            raise BitpressError(
                f"{layer} has the scale {worst:.3g}, which {_name(self.dtype)} cannot hold, and this format holds no "
                "other: keep the layer dense (ignore), or keep the checkpoint as it is."
            )
        if moved > self.greatest:
            self.greatest, self.where = moved, layer
        return rounded

    def warn(self) -> None:
        """Say what has been moved, if anything has."""
        if self.greatest:
            logger.warning(
                "scales are rounded to %s: weights move by %.2g of their value at most (in %s). Quantize the model in "
                "%s to serve what was evaluated.",
                _name(self.dtype),
                self.greatest,
                self.where,
                _name(self.dtype),
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
