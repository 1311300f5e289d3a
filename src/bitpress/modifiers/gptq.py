"""GPTQModifier: let the columns that are not rounded yet make up for the error of those that are."""

import logging
from collections.abc import Sequence

from pydantic import Field

from bitpress.modifiers.quantization import Problem, QuantizationModifier
from bitpress.modifiers.state import State
from bitpress.quantization import QuantizedWeight
from bitpress.solvers import gptq_together
from bitpress.statistics import Statistic

logger = logging.getLogger(__name__)


class GPTQModifier(QuantizationModifier):
    """GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) in place of round-to-nearest.

    It takes the scheme as a QuantizationModifier does. After an AWQModifier it uses the rescaled statistics and the
    ranges that were chosen there. ``actorder="static"`` in the scheme rounds the most active columns first.

    Attributes:
        dampening_frac: share of the mean of the Gram matrix's diagonal that is added to it. The usual 0.01 lets GPTQ
            hide its errors in directions that few calibration tokens happened to use: with so little, text unlike the
            calibration's fares worse than with AWQ alone (docs/benchmarks.md). It grows where the matrix cannot be
            factored even so, which is warned of.
        block_size: columns whose errors are passed on at once.
    """

    dampening_frac: float = Field(default=0.1, gt=0)
    block_size: int = Field(default=128, ge=1)

    def required_statistics(self, state: State, name: str) -> Statistic:
        """The Gram matrix of the layers that this modifier quantizes."""
        mine = state.owners.get(name) is self and name in state.schemes
        return super().required_statistics(state, name) | (Statistic.GRAM if mine else Statistic.NONE)

    def solve_all(self, problems: Sequence[Problem]) -> list[QuantizedWeight]:
        """See :meth:`QuantizationModifier.solve_all`; a layer that did not run is rounded to nearest.

        Layers that share their input and their scheme share a factorization, and are solved at once.
        """
        solved: dict[str, QuantizedWeight] = {}
        for problem in problems:
            if problem.name in solved:
                continue
            if problem.statistics is None or not problem.statistics.rows:
                solved[problem.name] = super().solve_all([problem])[0]
                continue
            group = [p for p in problems if _are_one(problem, p)]
            found = gptq_together(
                [p.weight for p in group],
                problem.statistics.gram,
                problem.args,
                problem.weight.dtype,
                [p.ranges for p in group],
                [p.global_scale for p in group],
                self.dampening_frac,
                self.block_size,
            )
            if found[0].dampening > self.dampening_frac:
                logger.warning(
                    "GPTQ needed a dampening of %g for %s (%g was asked for): the inputs of calibration say little of "
                    "some directions. More samples may help.",
                    found[0].dampening, ", ".join(p.name for p in group), self.dampening_frac,
                )  # fmt: skip
            for p, each in zip(group, found, strict=True):
                p.figures["dampening"] = each.dampening
                solved[p.name] = each.weight
        return [solved[problem.name] for problem in problems]


def _are_one(a: Problem, b: Problem) -> bool:
    return a.statistics is b.statistics and a.args == b.args and a.weight.dtype == b.weight.dtype
