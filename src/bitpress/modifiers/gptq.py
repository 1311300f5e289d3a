"""GPTQModifier: let the columns that are not rounded yet make up for the error of those that are."""

import logging

from pydantic import Field
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.modifiers.quantization import QuantizationModifier
from bitpress.modifiers.state import State
from bitpress.quantization import QuantizationArgs, QuantizationType, QuantizedWeight
from bitpress.solvers import gptq
from bitpress.statistics import InputStatistics, Statistic

logger = logging.getLogger(__name__)


class GPTQModifier(QuantizationModifier):
    """GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) in place of round-to-nearest.

    It takes the scheme as a QuantizationModifier does. After an AWQModifier it uses the rescaled statistics and the
    ranges that were chosen there. ``actorder="static"`` in the scheme rounds the most active columns first.

    Attributes:
        dampening_frac: share of the mean of the Gram matrix's diagonal that is added to it. It grows where the matrix
            cannot be factored with that, which is warned of.
        block_size: columns whose errors are passed on at once.
    """

    dampening_frac: float = Field(default=0.01, gt=0)
    block_size: int = Field(default=128, ge=1)

    def on_initialize(self, state: State) -> None:
        """Refuse grids that the solver does not know."""
        for name, scheme in state.schemes.items():
            if state.owners.get(name) is self and scheme.weights.type != QuantizationType.INT:
                raise BitpressError(
                    f"GPTQModifier rounds to integers, and the scheme of {name} has floats: use QuantizationModifier."
                )

    def required_statistics(self, state: State, name: str) -> Statistic:
        """The Gram matrix of the layers that this modifier quantizes."""
        mine = state.owners.get(name) is self and name in state.schemes
        return super().required_statistics(state, name) | (Statistic.GRAM if mine else Statistic.NONE)

    def solve(
        self,
        weight: Tensor,
        args: QuantizationArgs,
        statistics: InputStatistics | None,
        ranges: tuple[Tensor, Tensor] | None,
        global_scale: Tensor | None = None,
    ) -> QuantizedWeight:
        """See :meth:`QuantizationModifier.solve`; a layer that did not run is rounded to nearest."""
        if statistics is None or not statistics.rows:
            return super().solve(weight, args, statistics, ranges, global_scale)
        found = gptq(
            weight,
            statistics.gram,
            args,
            weight.dtype,
            ranges,
            dampening=self.dampening_frac,
            block_size=self.block_size,
        )
        if found.dampening > self.dampening_frac:
            logger.warning("GPTQ needed a dampening of %g (%g was asked for).", found.dampening, self.dampening_frac)
        return found.weight
