"""Ranges of a weight's groups, and round-to-nearest (RTN) on them."""

import math
from collections.abc import Iterator, Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.quantization.grid import SEARCH_CHUNK, affine_floats, affine_parameters, group_view, off_grid
from bitpress.quantization.weights import QuantizedWeight

SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.68)


def minmax_parameters(weight: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale (``dtype``) and zero point (int8) of the grids that span each group of ``weight`` (..., out, in), float32.

    Shapes, behind the leading dimensions: (1,) per tensor, (out, 1) per channel, (out, groups) per group.
    """
    return affine_parameters(*weight_ranges(weight, args), args, dtype)


def weight_ranges(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each group of ``weight``; shapes as :func:`minmax_parameters`."""
    if args.strategy == QuantizationStrategy.TENSOR:
        view = weight.flatten(-2)
        return view.amin(-1, keepdim=True), view.amax(-1, keepdim=True)
    # Two vectorized passes: on a CPU four times as fast as aminmax, which is not.
    view = group_view(weight, args)
    return view.amin(-1), view.amax(-1)


def search_parameters(
    weight: Tensor, args: QuantizationArgs, gram: Tensor | None, dtype: torch.dtype, shrinks: Sequence[float] = SHRINKS
) -> tuple[Tensor, Tensor]:
    """Ranges that are shrunk where clipping a few values costs less than it gains: AWQ's clip, without its forwards.

    Each group's range is [f min, f max] with the f of least ``e^T H_g e``, where e is the group's rounding error and
    H_g its own block of the Gram matrix. Lin et al., 2023 (https://arxiv.org/abs/2306.00978), section 4.1, choose f by
    the squared output error of the group on sampled tokens; this is the same quantity, on all tokens. With the diagonal
    of H alone each column's error is weighed by ``sum_t x_tj^2`` (an "importance matrix"), without it all alike: the
    squared error of the weight. The square, where others have powers of 2.4 and 3, is what the output's error is made
    of.

    Args:
        weight: (out, in), any float dtype; searched in float32.
        args: the scheme.
        gram: (in, in), float32; or (in,), its diagonal; or None for the identity.
        dtype: what scales are stored in.
        shrinks: the factors that are tried, the first of which should be 1.

    Returns:
        Scale and zero point as :func:`minmax_parameters` gives them.
    """
    weight = weight.float()
    size = args.group_size if args.strategy == QuantizationStrategy.GROUP else weight.shape[1]
    measure = _blocks(weight.new_ones(weight.shape[1]) if gram is None else gram, size)
    parts = weight.split(max(1, SEARCH_CHUNK // weight.shape[1]))
    if args.strategy == QuantizationStrategy.TENSOR:
        minimum, maximum = (x.unsqueeze(0) for x in weight_ranges(weight, args))
        costs = [torch.stack([cost.sum() for cost in _costs(rows, args, measure, minimum, maximum, dtype, shrinks)])
                 for rows in parts]  # fmt: skip
        shrink = shrinks[int(torch.stack(costs).sum(0).argmin())]
        return affine_parameters(minimum[0] * shrink, maximum[0] * shrink, args, dtype)
    found = [_search_rows(rows, args, measure, dtype, shrinks) for rows in parts]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero_point for _, zero_point in found])


def _blocks(gram: Tensor, size: int) -> Tensor:
    """The blocks of a matrix along its diagonal, (groups, size, size); of a diagonal, (groups, size, 1)."""
    if gram.dim() == 1:
        return gram.view(-1, size, 1)
    return torch.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])


def _search_rows(
    rows: Tensor, args: QuantizationArgs, measure: Tensor, dtype: torch.dtype, shrinks: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The search on a few rows; ``measure`` as :func:`_blocks` gives it."""
    minimum, maximum = (x.T.contiguous() for x in weight_ranges(rows, args))
    least = torch.full_like(minimum, math.inf)
    chosen = torch.ones_like(minimum)
    for shrink, cost in zip(shrinks, _costs(rows, args, measure, minimum, maximum, dtype, shrinks), strict=True):
        chosen.masked_fill_(cost < least, shrink)
        torch.minimum(cost, least, out=least)
    scale, zero_point = affine_parameters(minimum * chosen, maximum * chosen, args, dtype)
    return scale.T.contiguous(), zero_point.T.contiguous()


def _costs(
    rows: Tensor,
    args: QuantizationArgs,
    measure: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    dtype: torch.dtype,
    shrinks: Sequence[float],
) -> Iterator[Tensor]:
    """The error of each group, (groups, rows), with each shrink of ranges of that shape, or of one range for all."""
    view = group_view(rows, args).transpose(0, 1).contiguous()
    error, scratch, product = torch.empty_like(view), torch.empty_like(view), torch.empty_like(view)
    for shrink in shrinks:
        s, z = affine_floats(minimum * shrink, maximum * shrink, args, dtype)
        off_grid(view, s.unsqueeze(-1), z.unsqueeze(-1), args, out=error, scratch=scratch)
        if measure.shape[-1] == 1:
            cost = torch.bmm(error.square_(), measure).squeeze(-1)
        else:
            cost = torch.bmm(error, measure, out=product).mul_(error).sum(-1)
        # In steps; a group's error is its scale times that.
        yield cost.mul_(s).mul_(s)


def round_to_nearest(
    weight: Tensor, args: QuantizationArgs, dtype: torch.dtype, ranges: tuple[Tensor, Tensor] | None = None
) -> QuantizedWeight:
    """Each value to the nearest point of its group's grid.

    Args:
        weight: (out, in), any float dtype; rounded in float32.
        args: the scheme.
        dtype: what scales are stored in.
        ranges: scale and zero point; by default the grid spans the group's least and greatest value.
    """
    weight = weight.float()
    scale, zero_point = minmax_parameters(weight, args, dtype) if ranges is None else ranges
    return QuantizedWeight.on_grid(weight, scale, zero_point, args)


def check_finite(weight: Tensor, name: str) -> None:
    """Refuse a weight with NaN or infinite values.

    Raises:
        BitpressError: names the tensor and how many values are not finite.
    """
    if not weight.numel() or torch.stack(weight.aminmax()).isfinite().all():
        return
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise BitpressError(
            f"{name}.weight holds {bad} NaN or infinite values, so it has no grid. Mend the checkpoint, or add "
            f'"{name}" to ignore.'
        )
