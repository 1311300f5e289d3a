"""Coordinate descent: the points of one column after the other, against H."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from bitpress.quantization.grid import points_dtype, round_to_points
from bitpress.quantization.weights import QuantizedWeight
from bitpress.solvers.gptq import LEAF, by_row, group_of, steps_by_row
from bitpress.solvers.objective import LESS, row_errors


@torch.no_grad()
def coordinate_descent(
    weight: Tensor, quantized: QuantizedWeight, gram: Tensor, sweeps: int = 1, block_size: int = 128
) -> QuantizedWeight:
    """Set the points of one column after the other to the best there are, all other columns given.

    As QuantEase (Behdin et al., 2023, https://arxiv.org/abs/2309.01885) and cyclic CDQuant (Nair and Suggala, 2024,
    https://arxiv.org/abs/2406.17542) do: with ``G = (W - V) H``, the error as a function of column j is a parabola with
    its vertex at ``V[:, j] + G[:, j] / H[j, j]``, and the point of the grid that is nearest to it is the best. Changes
    are passed on to the columns behind by halves of a block, and behind the block by one product.

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
        # As bytes: not every device chooses among small floats.
        new, old = after.values.view(torch.int8), before.values.view(torch.int8)
        found.append(replace(before, values=torch.where(kept.unsqueeze(1), new, old).view(before.values.dtype)))
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
