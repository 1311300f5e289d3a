"""GPTQModifier: let the columns that are not rounded yet make up for the error of those that are."""

import logging
from collections.abc import Sequence

from pydantic import Field, PrivateAttr
from torch import Tensor

from bitpress.modifiers.quantization import Problem, QuantizationModifier
from bitpress.modifiers.state import State
from bitpress.quantization import QuantizedWeight
from bitpress.solvers import GPTQ, gptq_together, output_error, refine_together
from bitpress.statistics import Statistic

logger = logging.getLogger(__name__)


class GPTQModifier(QuantizationModifier):
    """GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) in place of round-to-nearest.

    It takes the scheme as a QuantizationModifier does. After an AWQModifier it uses the rescaled statistics and the
    ranges that were chosen there. ``actorder="static"`` in the scheme rounds the most active columns first.

    Attributes:
        dampening_frac: share of the mean of the Gram matrix's diagonal that is added to it. It grows where the matrix
            cannot be factored with that, which is warned of.
        block_size: columns whose errors are passed on at once.
        refine: rounds of refinement after GPTQ: in each, a sweep of coordinate descent over the columns, then scales
            refitted in closed form; 0 refits the scales only, None (the default) does nothing. See
            :func:`bitpress.solvers.refine_together`. One in eight batches (the last, where there are fewer) is kept out
            of what GPTQ and the refinement fit, and each layer keeps the round with the least error on these, which may
            be none: the report has them as ``refinement``. That takes the memory of a second Gram matrix, and a round
            the time of about two GPTQs. The batches that judge are of the calibration's kind of text, and do not see
            what is lost on another: see docs/benchmarks.md.
    """

    dampening_frac: float = Field(default=0.01, gt=0)
    block_size: int = Field(default=128, ge=1)
    refine: int | None = Field(default=None, ge=0)

    _warned: bool = PrivateAttr(default=False)

    def required_statistics(self, state: State, name: str) -> Statistic:
        """The Gram matrix of the layers that this modifier quantizes, and a held-out one if it refines."""
        mine = state.owners.get(name) is self and name in state.schemes
        wanted = Statistic.GRAM if self.refine is None else Statistic.GRAM | Statistic.HELD_OUT
        return super().required_statistics(state, name) | (wanted if mine else Statistic.NONE)

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
            statistics = problem.statistics
            # What judges is not fitted.
            judged = self.refine is not None and 0 < statistics.held_out_rows < statistics.rows
            gram = statistics.gram - statistics.held_out_gram if judged else statistics.gram
            found = gptq_together(
                [p.weight for p in group],
                gram,
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
            if judged:
                solved |= self._refined(group, found, gram, statistics.held_out_gram)
            elif self.refine is not None and not self._warned:
                self._warned = True
                logger.warning(
                    "%s was not refined: there is no second batch of calibration to judge it by. Further layers of "
                    "which that is true are not named.", problem.name,
                )  # fmt: skip
        return [solved[problem.name] for problem in problems]

    def on_finalize(self, state: State) -> None:
        """Warn again in the next model."""
        super().on_finalize(state)
        self._warned = False

    def _refined(
        self, group: Sequence[Problem], found: Sequence[GPTQ], gram: Tensor, held_out: Tensor
    ) -> dict[str, QuantizedWeight]:
        """What GPTQ found, refined as far as that helps on the held-out inputs."""
        weights, quantized = [p.weight for p in group], [each.weight for each in found]
        refined = refine_together(
            weights, quantized, gram, held_out, self.refine or 0, found[0].dampening, self.block_size
        )
        for p, each in zip(group, refined, strict=True):
            signal = max(output_error(p.weight.float(), held_out), 1e-30)
            p.figures["refinement"] = {"rounds": each.rounds, "held_out_errors": [e / signal for e in each.errors]}
        return {p.name: each.weight for p, each in zip(group, refined, strict=True)}


def _are_one(a: Problem, b: Problem) -> bool:
    return a.statistics is b.statistics and a.args == b.args and a.weight.dtype == b.weight.dtype
