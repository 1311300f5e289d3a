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
        what: the numbers, as the warning calls them.
        unit: what their differences are measured in.
        advice: how to avoid them.
        greatest: the greatest difference so far.
        where: the layer that has it.
    """

    dtype: torch.dtype
    what: str = "scales"
    unit: str = "of their value"
    advice: str = " Quantize the model in float16 or bfloat16, and what was evaluated is what ships."
    greatest: float = 0.0
    where: str = ""

    def __call__(self, layer: str, numbers: Tensor, unit: Tensor | None = None) -> Tensor:
        """``numbers`` in the dtype.

        Args:
            layer: whose they are.
            numbers: of any shape.
            unit: what a difference is measured by, of that shape; by default the number itself.

        Raises:
            BitpressError: one is too great or too small for it; names the layer.
        """
        rounded = numbers.to(self.dtype)
        if torch.equal(rounded.to(numbers.dtype), numbers):
            return rounded
        off = (rounded.double() - numbers.double()).div_((numbers if unit is None else unit).double()).abs_()
        off.nan_to_num_(0.0)
        moved = float(off.max())
        if not moved < 1.0:
            worst = float(numbers.flatten()[off.argmax()])
            raise BitpressError(
                f"{layer}: {_name(self.dtype)}, the dtype of this format's {self.what}, cannot hold {worst:.3g}. Keep "
                "the layer dense (ignore), or keep the checkpoint as it is."
            )
        if moved > self.greatest:
            self.greatest, self.where = moved, layer
        return rounded

    def warn(self) -> None:
        """Say what has been moved, if anything has."""
        if self.greatest:
            logger.warning(
                "%s are rounded to %s: weights move by %.2g %s at most (in %s).%s",
                self.what,
                _name(self.dtype),
                self.greatest,
                self.unit,
                self.where,
                self.advice,
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
