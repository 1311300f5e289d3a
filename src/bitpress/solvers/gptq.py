"""GPTQ: round column after column, and let the columns that are left make up for the error."""

import math
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationStrategy
from torch import Tensor

from bitpress.quantization.grid import integer_range
from bitpress.quantization.weights import QuantizedWeight
from bitpress.solvers.ranges import minmax_parameters

# Dampening is multiplied by this until the matrix can be factored.
GROWTH = 10.0
# Columns that are rounded one after the other; more are taken by halves.
LEAF = 16


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
    *,
    dampening: float = 0.01,
    block_size: int = 128,
) -> GPTQ:
    """The integers that GPTQ chooses (Frantar et al., 2022, https://arxiv.org/abs/2210.17323, algorithm 1).

    For each column j, with U the upper Cholesky factor of ``(H + dI)^-1``: the column is rounded, and its error over
    ``U[j, j]`` times the rest of U's row j is taken from the columns behind it. Within a block that is done by halves:
    once the left half is rounded, one product takes its errors from the right half. Behind the block, block by block.

    Every range is known before the first column is rounded: with ``args.actorder`` "weight" (or "static") the columns
    are taken in the order of falling ``H[j, j]``, each on the grid of the group that it stands in, and no order has to
    be stored.

    Args:
        weight: (out, in), any float dtype; solved in float32. Rows are solved apart from each other, so that layers
            which share their input are solved at once, one below the other.
        gram: (in, in), float32, ``H = X^T X``. Columns of zeros are rounded to nearest.
        args: the scheme.
        dtype: what scales are stored in.
        ranges: scale and zero point of every group; by default those that span the least and greatest value.
        dampening: d as a share of the mean of H's diagonal.
        block_size: columns whose errors are passed on at once to all columns behind them.
    """
    scale, zero_point = minmax_parameters(weight.float(), args, dtype) if ranges is None else ranges
    H = gram.float()
    order = H.diagonal().argsort(descending=True, stable=True) if _by_activation(args) else None
    columns = torch.arange(len(H), device=H.device) if order is None else order
    factor, used = inverse_factor(H if order is None else H[order][:, order], dampening)
    # Columns are rows here: each is contiguous. Where all rows share a range, it is a column of one.
    W = weight.T[columns].float()
    if W.data_ptr() == weight.data_ptr():
        W = W.clone()
    groups = columns // args.group_size if args.strategy == QuantizationStrategy.GROUP else columns * 0
    solver = _Columns(
        W,
        factor,
        scale.float().reshape(-1, scale.shape[-1]).T.contiguous(),
        zero_point.float().reshape(-1, scale.shape[-1]).T.contiguous(),
        groups.tolist(),
        args,
    )
    for start in range(0, len(W), block_size):
        stop = min(start + block_size, len(W))
        solver.solve(start, stop)
        solver.pass_on(start, stop, len(W))
    integers = torch.empty_like(W, dtype=torch.int8)
    integers[columns] = solver.values.to(torch.int8)
    return GPTQ(QuantizedWeight(integers.T.contiguous(), scale, zero_point, args), used)


class _Columns:
    """The columns while they are solved, as rows: ``left`` holds what is left to be rounded, then the errors."""

    def __init__(
        self, left: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, groups: list[int], args: QuantizationArgs
    ) -> None:
        self.left, self.factor, self.scale, self.zero_point, self.groups = left, factor, scale, zero_point, groups
        self.symmetric = args.symmetric
        self.limits = integer_range(args)
        self.values = torch.empty_like(left)
        self.diagonal = factor.diagonal().tolist()

    def solve(self, start: int, stop: int) -> None:
        if stop - start > LEAF:
            middle = (start + stop) // 2
            self.solve(start, middle)
            self.pass_on(start, middle, stop)
            self.solve(middle, stop)
            return
        for j in range(start, stop):
            self._round(j)
            if j + 1 < stop:
                self.left[j + 1 : stop].addr_(self.factor[j, j + 1 : stop], self.left[j], alpha=-1)

    def pass_on(self, start: int, middle: int, stop: int) -> None:
        """Take the errors of the columns up to ``middle`` from those behind it."""
        if middle < stop:
            self.left[middle:stop].addmm_(self.factor[start:middle, middle:stop].T, self.left[start:middle], alpha=-1)

    def _round(self, j: int) -> None:
        """Round column j, and put its error over ``U[j, j]`` in its place."""
        scale, q = self.scale[self.groups[j]], self.values[j]
        torch.div(self.left[j], scale, out=q)
        if self.symmetric:
            q.clamp_(*self.limits).round_()
            self.left[j].addcmul_(q, scale, value=-1).div_(self.diagonal[j])
        else:
            zero_point = self.zero_point[self.groups[j]]
            q.add_(zero_point).clamp_(*self.limits).round_()
            self.left[j].addcmul_(q - zero_point, scale, value=-1).div_(self.diagonal[j])


def inverse_factor(gram: Tensor, dampening: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of ``(H + dI)^-1``, and the dampening with which it could be had.

    Where H is not positive definite even so, d grows tenfold until it is; a matrix of zeros has the identity.

    Args:
        gram: (in, in), float32, symmetric. A zero on its diagonal, an input that is never active, counts as 1.
        dampening: d as a share of the mean of the diagonal.
    """
    H = gram.clone()
    diagonal = H.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal <= 0] = 1.0 if mean <= 0 else mean
    mean = float(diagonal.mean())
    added = 0.0
    used = max(dampening, torch.finfo(H.dtype).eps)
    while True:
        diagonal += used * mean - added
        added = used * mean
        # With P the reversal of order and P H P = L L^T, the factor is P L^-1 P: one factorization, no inverse of H.
        lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not failed and lower.isfinite().all():
            identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
            factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if factor.isfinite().all():
                return factor, used
        if not math.isfinite(added):
            return torch.eye(len(H), dtype=H.dtype, device=H.device), used
        used *= GROWTH


def _by_activation(args: QuantizationArgs) -> bool:
    return args.actorder in (ActivationOrdering.WEIGHT, ActivationOrdering.STATIC)
