"""GPTQ: round column after column, and let the columns that are left make up for the error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationType
from torch import Tensor

from bitpress.quantization.grid import GROUPED, block_shape, integer_range, points_dtype, round_to_points
from bitpress.quantization.scales import has_global_scale, shared_global_scale, step_sizes
from bitpress.quantization.weights import QuantizedWeight
from bitpress.solvers.ranges import minmax_parameters

# Dampening is multiplied by this until the matrix can be factored.
GROWTH = 10.0
# Columns that are rounded one after the other; more are taken by halves.
LEAF = 16
# Columns of a triangular matrix that are inverted together.
PANEL = 256


@dataclass(frozen=True)
class GPTQ:
    """What :func:`gptq` found.

    Attributes:
        weight: the quantized weight.
        dampening: the share of the mean of H's diagonal that was added to it: greater than what was asked for where H
            could not be factored with that.
    """

    weight: QuantizedWeight
    dampening: float


@torch.no_grad()
def gptq(
    weight: Tensor,
    gram: Tensor,
    args: QuantizationArgs,
    dtype: torch.dtype,
    ranges: tuple[Tensor, Tensor] | None = None,
    global_scale: Tensor | None = None,
    *,
    dampening: float = 0.01,
    block_size: int = 128,
) -> GPTQ:
    """The points that GPTQ chooses (Frantar et al., 2022, https://arxiv.org/abs/2210.17323, algorithm 1), on any grid.

    For each column j, with U the upper Cholesky factor of ``(H + dI)^-1``: the column is rounded, and its error
    times U's row j over ``U[j, j]`` is taken from the columns behind it. Within a block that is done by halves:
    once the left half is rounded, one product takes its errors from the right half. Behind the block, block by block.

    Every range is known before the first column is rounded: with ``args.actorder`` "weight" (or "static") the columns
    are taken in the order of falling ``H[j, j]``, each on the grid of the group that it stands in, and no order has to
    be stored.

    Args:
        weight: (out, in), any float dtype; solved in float32.
        gram: (in, in), float32, ``H = X^T X``. Columns of zeros are rounded to nearest.
        args: the scheme.
        dtype: what scales are stored in.
        ranges: scale and zero point of every group, of the shapes that :func:`minmax_parameters` gives; by default
            those that span the least and greatest value.
        global_scale: (1,), float32: what scales are relative to; by default, where the scheme has one, the weight's.
        dampening: d as a share of the mean of H's diagonal.
        block_size: columns whose errors are passed on at once to all columns behind them.
    """
    return gptq_together([weight], gram, args, dtype, [ranges], [global_scale], dampening, block_size)[0]


@torch.no_grad()
def gptq_together(
    weights: Sequence[Tensor],
    gram: Tensor,
    args: QuantizationArgs,
    dtype: torch.dtype,
    ranges: Sequence[tuple[Tensor, Tensor] | None],
    global_scales: Sequence[Tensor | None],
    dampening: float = 0.01,
    block_size: int = 128,
) -> list[GPTQ]:
    """:func:`gptq` of layers that share their input and their scheme: rows are solved apart, so all layers' at once."""
    wholes = [
        shared_global_scale([weight], args) if whole is None and has_global_scale(args) else whole
        for weight, whole in zip(weights, global_scales, strict=True)
    ]
    found = [
        minmax_parameters(weight.float(), args, dtype, whole) if stated is None else stated
        for weight, stated, whole in zip(weights, ranges, wholes, strict=True)
    ]
    H = gram.float()
    order = H.diagonal().argsort(descending=True, stable=True) if _by_activation(args) else None
    columns = torch.arange(len(H), device=H.device) if order is None else order
    factor, used = inverse_factor(H if order is None else H[order][:, order], dampening)
    rows = [len(weight) for weight in weights]
    # Columns are rows here: each is contiguous.
    solver = _Columns(
        torch.cat([weight.T[columns].float() for weight in weights], 1),
        factor,
        torch.cat([steps_by_row(s, whole, n, args) for (s, _), whole, n in zip(found, wholes, rows, strict=True)], 1),
        torch.cat([by_row(z, n, args) for (_, z), n in zip(found, rows, strict=True)], 1),
        group_of(columns, args),
        args,
    )
    for start in range(0, len(H), block_size):
        stop = min(start + block_size, len(H))
        solver.solve(start, stop)
        solver.pass_on(start, stop, len(H))
    points = torch.empty_like(solver.left)
    points[columns] = solver.points()
    return [
        GPTQ(QuantizedWeight(part.T.contiguous().to(points_dtype(args)), *parameters, args, whole), used)
        for part, parameters, whole in zip(points.split(rows, 1), found, wholes, strict=True)
    ]


def steps_by_row(scale: Tensor, global_scale: Tensor | None, rows: int, args: QuantizationArgs) -> Tensor:
    """Step sizes of every row: (groups, rows), float32."""
    return by_row(step_sizes(scale, global_scale), rows, args)


def by_row(parameters: Tensor, rows: int, args: QuantizationArgs) -> Tensor:
    """Parameters of every row: (groups, rows), float32."""
    block = block_shape(args)
    if block is not None:
        parameters = parameters.repeat_interleave(block[0], 0)[:rows]
    return parameters.float().reshape(-1, parameters.shape[-1]).expand(rows, -1).T.contiguous()


def group_of(columns: Tensor, args: QuantizationArgs) -> list[int]:
    """The group in which each column stands."""
    block = block_shape(args)
    if block is None and args.strategy not in GROUPED:
        return [0] * len(columns)
    groups: list[int] = (columns // (args.group_size if block is None else block[1])).tolist()
    return groups


class _Columns:
    """The columns while they are solved, as rows: ``left`` holds what is left to be rounded, then the errors.

    The factor's rows are divided by its diagonal, once, in place of each error. Calling a kernel costs more than it
    takes for a column of a small layer: what can be is done for all columns at once.
    """

    def __init__(
        self, left: Tensor, factor: Tensor, step: Tensor, zero_point: Tensor, groups: list[int], args: QuantizationArgs
    ) -> None:
        self.left, self.factor, self.args = left, factor.div_(factor.diagonal().clone().unsqueeze(1)), args
        self.zero_point = None if args.symmetric else zero_point[groups]
        steps, limits = step.unbind(), self._limits(zero_point)
        self.of_column = [(steps[g], *limits[g]) for g in groups]
        # Points less their zero point, until all are known.
        self.offsets = torch.empty_like(left)

    def points(self) -> Tensor:
        """What was chosen, once all columns are solved: of the shape of ``left``."""
        return self.offsets if self.zero_point is None else self.offsets.add_(self.zero_point)

    def solve(self, start: int, stop: int) -> None:
        if stop - start > LEAF:
            middle = (start + stop) // 2
            self.solve(start, middle)
            self.pass_on(start, middle, stop)
            self.solve(middle, stop)
            return
        errors, columns = self.left[start:stop].T, self.factor[start:stop, start:stop].unbind(1)
        rows = zip(self.left[start:stop].unbind(), self.offsets[start:stop].unbind(), strict=True)
        for k, (x, q) in enumerate(rows):
            if k:
                x.addmv_(errors[:, :k], columns[k][:k], alpha=-1)
            step, low, high = self.of_column[start + k]
            torch.div(x, step, out=q)
            if low is None:
                round_to_points(q, self.args)
            else:
                torch.clamp(q.round_(), low, high, out=q)
            x.addcmul_(q, step, value=-1)

    def pass_on(self, start: int, middle: int, stop: int) -> None:
        """Take the errors of the columns up to ``middle`` from those behind it."""
        if middle < stop:
            self.left[middle:stop].addmm_(self.factor[start:middle, middle:stop].T, self.left[start:middle], alpha=-1)

    def _limits(self, zero_point: Tensor) -> list[tuple[Any, Any]]:
        """The least and the greatest offset of each group; None where the points are not integers."""
        if self.args.type != QuantizationType.INT:
            return [(None, None)] * len(zero_point)
        low, high = integer_range(self.args)
        if self.zero_point is None:
            return [(low, high)] * len(zero_point)
        return list(zip((low - zero_point).unbind(), (high - zero_point).unbind(), strict=True))


def inverse_factor(gram: Tensor, dampening: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of ``(H + dI)^-1``, and the dampening with which it could be had.

    Where H is not positive definite even so, d grows tenfold until it is; a matrix of zeros has the identity.

    Args:
        gram: (in, in), float32, symmetric. A zero on its diagonal, an input that is never active, counts as 1.
        dampening: d as a share of the mean of the diagonal.
    """
    H = _with_all_active(gram)
    diagonal = H.diagonal()
    mean = float(diagonal.mean())
    added = 0.0
    used = max(dampening, torch.finfo(H.dtype).eps)
    while True:
        diagonal += used * mean - added
        added = used * mean
        # With P the reversal of order and P H P = L L^T, the factor is P L^-1 P: one factorization, no inverse of H.
        lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        # What is not finite in a row is so on its diagonal.
        if not failed and lower.diagonal().isfinite().all():
            factor = _inverse(lower).flip(0, 1)
            if factor.sum().isfinite():
                return factor, used
        if not math.isfinite(added):
            return torch.eye(len(H), dtype=H.dtype, device=H.device), used
        used *= GROWTH


def _inverse(lower: Tensor) -> Tensor:
    """Of a lower triangular matrix: panel by panel, as above the diagonal there is nothing to solve for."""
    inverse = torch.zeros_like(lower)
    for start in range(0, len(lower), PANEL):
        below = lower[start:, start:]
        ones = torch.eye(len(below), min(PANEL, len(below)), dtype=lower.dtype, device=lower.device)
        inverse[start:, start : start + PANEL] = torch.linalg.solve_triangular(below, ones, upper=False)
    return inverse


def dampened(gram: Tensor, dampening: float) -> Tensor:
    """``H + dI``, the matrix whose error GPTQ lowers: see :func:`inverse_factor`."""
    H = _with_all_active(gram.float())
    diagonal = H.diagonal()
    diagonal += dampening * diagonal.mean()
    return H


def _with_all_active(gram: Tensor) -> Tensor:
    H = gram.clone()
    diagonal = H.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal <= 0] = 1.0 if mean <= 0 else mean
    return H


def _by_activation(args: QuantizationArgs) -> bool:
    return args.actorder in (ActivationOrdering.WEIGHT, ActivationOrdering.STATIC)
