"""Refinement of what is rounded already: integers one column at a time, and scales in closed form, against H.

Both lower ``(w - v)^T H (w - v)`` for each row w of a weight and its values ``v = (q - z) s``. Either can be had with the
other fixed, so they take turns (:func:`refine_together`). H should be the dampened matrix that the solver used: the
lower the error on the very inputs that are fitted, the more of it is noise, and what came of it is judged by others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor, nn

from bitpress.quantization.grid import GROUPED, block_shape, points_dtype, round_to_points
from bitpress.quantization.scales import ScaleKind, nearest_scale, scale_kind, step_sizes
from bitpress.quantization.weights import QuantizedWeight
from bitpress.solvers.gptq import LEAF, by_row, dampened, group_of, steps_by_row
from bitpress.solvers.objective import output_error

# Elements that the equations of some rows may take: 64 MiB of float32.
CHUNK = 1 << 24
# The pull of the present scales, as a share of the curvature along each.
RIDGE = 1e-3
# What counts as less: rounding of a float32 sum does not.
LESS = 1 - 1e-5


@dataclass(frozen=True)
class Refined:
    """What :func:`refine_together` found for a layer.

    Attributes:
        weight: the quantized weight with the least error on the held-out inputs.
        rounds: after which round it was had; 0 is what was to be refined.
        errors: the held-out error after every round, ``trace(dW H dW^T)``.
    """

    weight: QuantizedWeight
    rounds: int
    errors: list[float]


@torch.no_grad()
def refine_together(
    weights: Sequence[Tensor],
    quantized: Sequence[QuantizedWeight],
    gram: Tensor,
    held_out: Tensor,
    sweeps: int,
    dampening: float,
    block_size: int = 128,
) -> list[Refined]:
    """Scales refitted, then ``sweeps`` rounds of a sweep over the columns and another refit; the best is kept.

    The best is that of the least error on inputs that were not fitted, layer by layer.

    Args:
        weights: (out, in) of layers that share their input.
        quantized: the same, quantized, with one scheme and one dtype.
        gram: (in, in), float32: of the inputs that are fitted.
        held_out: (in, in), float32: of other inputs.
        sweeps: how many; 0 refits the scales only.
        dampening: as a share of the mean of ``gram``'s diagonal.
        block_size: see :func:`coordinate_descent`.
    """
    H = dampened(gram, dampening)
    rounds = [list(quantized)]
    for sweep in range(sweeps + 1):
        last = rounds[-1]
        if sweep:
            last = descend_together(weights, last, H, 1, block_size)
        rounds.append([refit_scales(w, q, H) for w, q in zip(weights, last, strict=True)])
    found = []
    for weight, tried in zip(weights, zip(*rounds, strict=True), strict=True):
        errors = [output_error(q.dequantize().float() - weight.float(), held_out) for q in tried]
        best = errors.index(min(errors))
        found.append(Refined(tried[best], best, errors))
    return found


@torch.no_grad()
def coordinate_descent(
    weight: Tensor, quantized: QuantizedWeight, gram: Tensor, sweeps: int = 1, block_size: int = 128
) -> QuantizedWeight:
    """Set the points of one column after the other to the best there are, all other columns given.

    As QuantEase (Behdin et al., 2023, https://arxiv.org/abs/2309.01885, equation 7) and cyclic CDQuant (Nair and
    Suggala, 2024, https://arxiv.org/abs/2406.17542) do: with ``G = (W - V) H``, the error as a function of column j is a
    parabola with its vertex at ``V[:, j] + G[:, j] / H[j, j]``, and the nearest point of the grid is its least on it.
    The changes are passed on to the columns behind by halves of a block, and behind the block by one product.

    No row's error ``(w - v) H (w - v)^T`` grows.

    Args:
        weight: (out, in), any float dtype; solved in float32.
        quantized: the same, quantized, on any grid.
        gram: (in, in), float32, positive semi-definite.
        sweeps: how often each column is visited; it ends early where nothing changes any more.
        block_size: columns whose changes are passed on at once.
    """
    return descend_together([weight], [quantized], gram, sweeps, block_size)[0]


@torch.no_grad()
def descend_together(
    weights: Sequence[Tensor],
    quantized: Sequence[QuantizedWeight],
    gram: Tensor,
    sweeps: int = 1,
    block_size: int = 128,
) -> list[QuantizedWeight]:
    """:func:`coordinate_descent` of layers that share their input and their scheme: all layers' rows at once."""
    args, rows = quantized[0].args, [len(weight) for weight in weights]
    joined = list(zip(quantized, rows, strict=True))
    # Columns are rows here, as in GPTQ: each is contiguous.
    descent = _Descent(
        torch.cat([weight.T.float() for weight in weights], 1),
        torch.cat([q.values.T.float() for q in quantized], 1),
        gram.float(),
        torch.cat([steps_by_row(q.scale, q.global_scale, n, args) for q, n in joined], 1),
        torch.cat([by_row(q.zero_point, n, args) for q, n in joined], 1),
        args,
    )
    for sweep in range(sweeps):
        if not descent.sweep(block_size, last=sweep == sweeps - 1):
            break
    found = []
    for weight, before, points in zip(weights, quantized, descent.points.split(rows, 1), strict=True):
        after = replace(before, values=points.T.contiguous().to(points_dtype(args)))
        kept = row_errors(weight, after, gram) < row_errors(weight, before, gram) * LESS
        # Not every device chooses among small floats.
        values = [q.values.view(torch.int8) for q in (after, before)]
        found.append(replace(before, values=torch.where(kept.unsqueeze(1), *values).view(before.values.dtype)))
    return found


class _Descent:
    """The columns, as rows, while they are visited; ``pull`` is ``H (W - V)``."""

    def __init__(
        self, weight: Tensor, points: Tensor, gram: Tensor, step: Tensor, zero_point: Tensor, args: QuantizationArgs
    ) -> None:
        self.points, self.gram, self.step, self.args = points, gram, step, args
        self.zero_point = None if args.symmetric else zero_point
        self.groups = group_of(torch.arange(len(gram)), args)
        offset = points if self.zero_point is None else points - self.zero_point[self.groups]
        self.values = offset * step[self.groups]
        self.pull = gram @ (weight - self.values)
        # A column whose inputs are all zero is pulled nowhere.
        self.curvature = gram.diagonal().clamp(min=torch.finfo(torch.float32).tiny).tolist()
        self.change = torch.empty_like(points)

    def sweep(self, block_size: int, *, last: bool) -> bool:
        """Visit every column; False if none changed."""
        changed = False
        for start in range(0, len(self.gram), block_size):
            stop = min(start + block_size, len(self.gram))
            before = self.pull[start:stop].clone()
            self.solve(start, stop)
            self.pull[start:stop] = before
            change = self.change[start:stop]
            changed |= bool(change.any())
            behind = stop if last else 0
            if behind < len(self.gram):
                self.pull[behind:].addmm_(self.gram[behind:, start:stop], change, alpha=-1)
        return changed

    def solve(self, start: int, stop: int) -> None:
        if stop - start > LEAF:
            middle = (start + stop) // 2
            self.solve(start, middle)
            self.pull[middle:stop].addmm_(self.gram[middle:stop, start:middle], self.change[start:middle], alpha=-1)
            self.solve(middle, stop)
            return
        for j in range(start, stop):
            self._visit(j)
            if j + 1 < stop:
                self.pull[j + 1 : stop].addr_(self.gram[j, j + 1 : stop], self.change[j], alpha=-1)

    def _visit(self, j: int) -> None:
        step, q, value, change = self.step[self.groups[j]], self.points[j], self.values[j], self.change[j]
        torch.add(value, self.pull[j], alpha=1 / self.curvature[j], out=q).div_(step)
        zero_point = None if self.zero_point is None else self.zero_point[self.groups[j]]
        if zero_point is not None:
            q.add_(zero_point)
        round_to_points(q, self.args)
        torch.mul(q if zero_point is None else q - zero_point, step, out=change)
        change.sub_(value)
        value.add_(change)


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
    scale = nearest_scale(fitted, args, quantized.scale.dtype, quantized.global_scale)
    after = replace(quantized, scale=scale)
    before_error, after_error = (_sums(row_errors(weight, q, gram), together).unsqueeze(-1) for q in (quantized, after))
    kept = (after_error < before_error * LESS).reshape(-1, *[1] * (scale.dim() - 1))
    return replace(after, scale=torch.where(kept, scale, quantized.scale))


def row_errors(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> Tensor:
    """``(w - v) H (w - v)^T`` of each row, v as every reader computes it: (out,), float32."""
    delta = quantized.dequantize().float() - weight.float()
    return (delta @ gram).mul_(delta).sum(1)


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
    return (nn.functional.pad(x, (0, short)) if short else x).unflatten(-1, (-1, width)).sum(-1)
