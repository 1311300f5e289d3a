"""GPTQModifier: let the columns that are not rounded yet make up for the error of those that are."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.quantization import ActivationOrdering
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.linears import weight_matrix
from bitpress.modifiers.foreign import OF_GPTQ, Foreign
from bitpress.modifiers.fused import choose_global_scales
from bitpress.modifiers.quantization import QuantizationModifier, with_weights
from bitpress.modifiers.sharing import UNIT, Cost, Problem, factored_cost, joined_rows, search_ranges
from bitpress.modifiers.state import State
from bitpress.quantization import QuantizationScheme, QuantizedWeight
from bitpress.ranks import Found, Piece, Work, share_out
from bitpress.solvers import (
    GPTQ,
    corrected_weight,
    gptq_together,
    output_error,
    refine_together,
)
from bitpress.statistics import InputStatistics, Statistic

logger = logging.getLogger(__name__)


class GPTQModifier(QuantizationModifier):
    """GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) in place of round-to-nearest.

    It takes the scheme as a QuantizationModifier does. After an AWQModifier it uses the rescaled statistics and the
    ranges that were chosen there.

    Attributes:
        dampening_frac: share of the mean of the Gram matrix's diagonal that is added to it. The usual 0.01 lets GPTQ
            hide its errors in directions that few calibration tokens happened to use: with so little, text unlike the
            calibration's fares worse than with AWQ alone (docs/benchmarks.md). It grows where the matrix cannot be
            factored even so, which is warned of.
        actorder: "static" rounds the most active columns first, at no cost when the model runs; None rounds them in
            turn. Where it is not stated, a scheme may say so (``actorder``), and "static" holds for one that does not.
        block_size: columns whose errors are passed on at once.
        refine: rounds of refinement after GPTQ: in each, a sweep of coordinate descent over the columns, then scales
            refitted in closed form; 0 refits the scales only, None (the default) does nothing. See
            :func:`bitpress.solvers.refine_together`. One in eight batches (the last, where there are fewer) is kept out
            of what GPTQ and the refinement fit, and each layer keeps the round with the least error on these, which may
            be none: the report has them as ``refinement``. That takes the memory of a second Gram matrix, and a round
            the time of about two GPTQs. The batches that judge are of the calibration's kind of text, and do not see
            what is lost on another: see docs/benchmarks.md.
        error_correction: how far each weight goes, before it is rounded, towards the one that makes up for what the
            compressed layers before its block have done to its inputs; see :func:`bitpress.solvers.corrected_weight`.
            0 leaves it where it is, and costs nothing; else a second forward of the original model goes beside the
            compressed one's. Only the sequential pipeline has inputs that differ. Try 0.5: 1 overshoots, it seems
            because all layers of a block make up for the same error. The report's errors are then those of rounding the
            corrected weight, and ``correction`` is the share of the output's energy by which it moved.
    """

    dampening_frac: float = Field(default=0.1, gt=0)
    actorder: Literal["static"] | None = "static"
    block_size: int = Field(default=128, ge=1)
    refine: int | None = Field(default=None, ge=0)
    error_correction: float = Field(default=0.0, ge=0, le=1)

    foreign: ClassVar[Mapping[str, Foreign]] = OF_GPTQ

    _warned: bool = PrivateAttr(default=False)

    @field_validator("dampening_frac", "block_size", mode="before")
    @classmethod
    def _unstated(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[info.field_name or ""].default if value is None else value

    @field_validator("actorder", mode="before")
    @classmethod
    def _order(cls, value: Any) -> Any:
        if value in ("group", "dynamic"):
            raise ValueError(f'{value!r} makes servers look up the order of columns: use "static"')
        return "static" if value == "weight" else value or None

    def completed(self, scheme: QuantizationScheme) -> QuantizationScheme:
        """See :meth:`QuantizationModifier.completed`: ``scheme`` with ``actorder``.

        Raises:
            BitpressError: the scheme states another.
        """
        scheme = super().completed(scheme)
        if scheme.weights is None:
            return scheme
        stated = None if scheme.weights.actorder is None else "static"
        if "actorder" in self.model_fields_set and stated is not None and stated != self.actorder:
            raise BitpressError(
                f"GPTQModifier states actorder={self.actorder}, but a scheme of it {scheme.weights.actorder.value!r}: "
                "state it in one of them only."
            )
        return scheme if stated == self.actorder else with_weights(scheme, actorder=ActivationOrdering.STATIC)

    def required_statistics(self, state: State, name: str) -> Statistic:
        """The Gram matrix of the layers that this modifier quantizes; a held-out one if it refines; their drift."""
        mine = state.owners.get(name) is self and name in state.schemes
        own = Statistic.GRAM
        if self.refine is not None:
            own |= Statistic.HELD_OUT
        if self.error_correction:
            own |= Statistic.DRIFT
        return super().required_statistics(state, name) | (own if mine else Statistic.NONE)

    def on_block(self, state: State, block: Block) -> None:
        """Correct the block's weights if that is asked for, and quantize them."""
        if self.error_correction:
            self._correct(state, block)
        super().on_block(state, block)

    def _correct(self, state: State, block: Block) -> None:
        """Write the corrected weights; ranges that an earlier modifier has searched are searched again for them."""
        sharing: dict[int, list[str]] = {}
        for name in block.layers:
            statistics = state.statistics.get(name)
            if state.owners.get(name) is self and statistics is not None and statistics.drift.any():
                sharing.setdefault(id(statistics), []).append(name)
        groups = list(sharing.values())
        wholes = [torch.cat([weight_matrix(block.layers[name]) for name in names]) for names in groups]

        def correct(piece: Piece) -> Found:
            rows, statistics = wholes[piece.matrix][piece.start : piece.stop], state.statistics[groups[piece.matrix][0]]
            fields = {"dampening": self.dampening_frac, "strength": self.error_correction}
            return Found([corrected_weight(rows, statistics.gram, statistics.drift, **fields)])

        costs = [
            self.cost(whole.shape[1], state.statistics[names[0]]) for whole, names in zip(wholes, groups, strict=True)
        ]
        works = [
            Work((i,), (len(m),), UNIT, c.fixed, c.per_row) for i, (m, c) in enumerate(zip(wholes, costs, strict=True))
        ]
        for index, parts in share_out(state.ranks, works, lambda pieces: [correct(p) for p in pieces]).items():
            matrices = [weight_matrix(block.layers[name]) for name in groups[index]]
            gram, whole = state.statistics[groups[index][0]].gram, joined_rows([part.tensors[0] for part in parts])
            for name, matrix, new in zip(groups[index], matrices, whole.split([len(m) for m in matrices]), strict=True):
                before = matrix.float()
                moved = output_error(new - before, gram) / max(output_error(before, gram), 1e-30)
                state.layer_records.setdefault(name, {})["correction"] = moved
                matrix.copy_(new)
        corrected = [name for names in groups for name in names]
        if state.global_scales and corrected:
            state.global_scales = {}
            choose_global_scales(state, block)
        search_ranges(state, {name: block.layers[name] for name in corrected if name in state.ranges})

    @property
    def rows_apart(self) -> bool:
        """See :attr:`QuantizationModifier.rows_apart`: but what judges a refinement is the error of the whole layer."""
        own = type(self)
        plain = own.solve_all is GPTQModifier.solve_all and own.solve is QuantizationModifier.solve
        return plain and self.refine is None

    def cost(self, columns: int, statistics: InputStatistics | None) -> Cost:
        """See :meth:`QuantizationModifier.cost`: a factorization for all rows, and their columns in turn."""
        return factored_cost(columns, statistics)

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
                    "%s was not refined: there is no second batch of calibration to judge it by. Give more samples, or "
                    "a smaller batch_size. Further layers of which that is true are not named.", problem.name,
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
