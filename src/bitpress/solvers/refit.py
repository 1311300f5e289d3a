"""Scales in closed form, against H, with the integers as they are. Own: the normal equations of least squares."""

from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor, nn

from bitpress.quantization.grid import GROUPED, block_shape
from bitpress.quantization.scales import ScaleKind, nearest_scale, scale_kind, step_sizes
from bitpress.quantization.weights import QuantizedWeight
from bitpress.solvers.gptq import by_row, steps_by_row
from bitpress.solvers.objective import LESS, row_errors

# Elements that the equations of some rows may take: 64 MiB of float32.
CHUNK = 1 << 24
# The pull of the present scales, as a share of the curvature along each.
RIDGE = 1e-3


@torch.no_grad()
def refit_scales(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> QuantizedWeight:
    """The scales with the least error, the integers and zero points given.

    With ``B = q - z`` and b_g its part in group g, ``v = sum_g s_g b_g`` is linear in a row's scales: the least squares
    ``A s = c`` have ``A[g, h] = b_g H b_h^T`` and ``c[g] = b_g H w^T``, solved for the change of s with a small ridge.
    Their matrices take half of 2 out in^2 operations, by the symmetry of A. Scales that rows share (per tensor, per
    block) have the sum of these rows' equations.

    The scales are rounded to the precision they are stored in, and only then is the error taken: a row whose error is
    not less keeps its own. Scales that are powers of two stay as they are.

    Args:
        weight: (out, in), any float dtype; solved in float32.
        quantized: the same, quantized, on any grid.
        gram: (in, in), float32, positive semi-definite.
    """
    args = quantized.args
    if scale_kind(args) == ScaleKind.POWER:
        return quantized
    together, width = _shared(quantized, args)
    steps = step_sizes(quantized.scale, quantized.global_scale).float()
    steps = steps.reshape(-1, steps.shape[-1])
    groups = steps.shape[-1]
    taken = together * max(1, CHUNK // (together * max(len(gram), groups * groups)))
    parts = []
    for start in range(0, len(weight), taken):
        rows = slice(start, start + taken)
        own = slice(start // together, -(-min(start + taken, len(weight)) // together))
        parts.append(steps[own] + _best_change(weight[rows], _cut(quantized, rows, own), gram, together, width))
    fitted = torch.cat(parts)
    fitted = torch.where((fitted > 0) & fitted.isfinite(), fitted, steps).reshape(quantized.scale.shape)
    scale = nearest_scale(fitted, quantized.scale.dtype, quantized.global_scale)
    after = replace(quantized, scale=scale)
    before_error, after_error = (_sums(row_errors(weight, q, gram), together).unsqueeze(-1) for q in (quantized, after))
    kept = (after_error < before_error * LESS).reshape(-1, *[1] * (scale.dim() - 1))
    return replace(after, scale=torch.where(kept, scale, quantized.scale))


def _best_change(weight: Tensor, quantized: QuantizedWeight, gram: Tensor, together: int, width: int) -> Tensor:
    """How the steps should change: (rows / ``together``, groups), float32."""
    rows, args = len(weight), quantized.args
    steps = steps_by_row(quantized.scale, quantized.global_scale, rows, args).T
    offset = quantized.values.float()
    index = torch.arange(weight.shape[1], device=weight.device) // width
    if not args.symmetric:
        offset -= by_row(quantized.zero_point, rows, args).T[:, index]
    pull = (weight.float() - offset * steps[:, index]) @ gram
    wanted = _sums(_sums(offset * pull, width).T, together).T
    groups = wanted.shape[-1]
    matrix = wanted.new_zeros(len(wanted), groups, groups)
    for g in range(groups):
        first, last = g * width, min((g + 1) * width, weight.shape[1])
        products = (offset[:, first:last] @ gram[first:last, first:]).mul_(offset[:, first:])
        matrix[:, g:, g] = _sums(_sums(products, width).T, together).T
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    # A group of zeros has no say.
    diagonal += torch.where(diagonal > 0, RIDGE * diagonal, 1.0)
    factor, failed = torch.linalg.cholesky_ex(matrix)  # reads what is on and below the diagonal only
    change = torch.cholesky_solve(wanted.unsqueeze(-1), factor).squeeze(-1)
    return torch.where((failed == 0).unsqueeze(-1), change, 0.0)


def _shared(quantized: QuantizedWeight, args: QuantizationArgs) -> tuple[int, int]:
    """How many rows and how many columns share a scale."""
    rows, columns = quantized.values.shape
    block = block_shape(args)
    if block is not None:
        return block
    together = rows if args.strategy == QuantizationStrategy.TENSOR else 1
    return together, args.group_size if args.strategy in GROUPED else columns


def _cut(quantized: QuantizedWeight, rows: slice, own: slice) -> QuantizedWeight:
    """Some rows of a quantized weight, with the parameters that are theirs."""
    parameters = {name: getattr(quantized, name) for name in ("scale", "zero_point")}
    return replace(quantized, values=quantized.values[rows], **{name: p[own] for name, p in parameters.items()})


def _sums(x: Tensor, width: int) -> Tensor:
    """Sums of ``width`` neighbours of the last dimension; the last ones may be fewer."""
    if width == 1:
        return x
    short = -x.shape[-1] % width
    sums: Tensor = (nn.functional.pad(x, (0, short)) if short else x).unflatten(-1, (-1, width)).sum(-1)
    return sums
