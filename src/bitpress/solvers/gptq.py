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
    ``U[j, j]`` times the rest of U's row j is taken from the columns behind it, within a block at once, behind it block
    by block.

    Every range is known before the first column is rounded: with ``args.actorder`` "weight" (or "static") the columns
    are taken in the order of falling ``H[j, j]``, each on the grid of the group that it stands in, and no order has to
    be stored.

    Args:
        weight: (out, in), any float dtype; solved in float32.
        gram: (in, in), float32, ``H = X^T X``. Columns of zeros are rounded to nearest.
        args: the scheme.
        dtype: what scales are stored in.
        ranges: scale and zero point of every group; by default those that span the least and greatest value.
        dampening: d as a share of the mean of H's diagonal.
        block_size: columns whose errors are passed on at once.
    """
    W = weight.float().clone()
    scale, zero_point = minmax_parameters(W, args, dtype) if ranges is None else ranges
    H = gram.float()
    diagonal = H.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if _by_activation(args) else None
    if order is not None:
        W, H = W[:, order], H[order][:, order]
    factor, used = inverse_factor(H, dampening)
    columns = torch.arange(W.shape[1], device=W.device) if order is None else order
    steps, offsets = _of_columns(scale.float(), columns, args), _of_columns(zero_point.float(), columns, args)
    values = torch.empty_like(W)
    # Columns are rows here: each is contiguous.
    W, steps, offsets, values = W.T.contiguous(), steps.T.contiguous(), offsets.T.contiguous(), values.T.contiguous()
    q_min, q_max = integer_range(args)
    for start in range(0, len(W), block_size):
        stop = min(start + block_size, len(W))
        part, local = W[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for j in range(stop - start):
            s, z = steps[start + j], offsets[start + j]
            q = torch.div(part[j], s).add_(z).clamp_(q_min, q_max).round_()
            values[start + j] = q
            error = q.sub_(z).mul_(s).sub_(part[j]).neg_().div_(local[j, j])
            errors[j] = error
            if j + 1 < stop - start:
                part[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1)
        W[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    integers = torch.empty_like(values, dtype=torch.int8)
    integers[columns] = values.to(torch.int8)
    return GPTQ(QuantizedWeight(integers.T.contiguous(), scale, zero_point, args), used)


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
        lower, failed = torch.linalg.cholesky_ex(H)
        if not failed and lower.isfinite().all():
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and factor.isfinite().all():
                return factor, used
        if not math.isfinite(added):
            return torch.eye(len(H), dtype=H.dtype, device=H.device), used
        used *= GROWTH


def _by_activation(args: QuantizationArgs) -> bool:
    return args.actorder in (ActivationOrdering.WEIGHT, ActivationOrdering.STATIC)


def _of_columns(parameters: Tensor, columns: Tensor, args: QuantizationArgs) -> Tensor:
    """Scale or zero point of each column: (out, in), or (1, in) where all rows share it."""
    if args.strategy == QuantizationStrategy.GROUP:
        return parameters[:, columns // args.group_size]
    return parameters.reshape(-1, 1).expand(-1, len(columns))
