"""Ranges of a weight's groups, and round-to-nearest (RTN) on them.

The grid is that of Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (2017), https://arxiv.org/abs/1712.05877, equation 1: ``w = (q - z) s``, with a range that holds 0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.quantization.grid import GROUPED, SEARCH_CHUNK, block_shape, group_view, off_grid, padded
from bitpress.quantization.scales import (
    ScaleKind,
    affine_floats,
    affine_parameters,
    has_global_scale,
    scale_kind,
    shared_global_scale,
)
from bitpress.quantization.weights import QuantizedWeight

SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.68)
# Floats lie closest below each power of two: to widen a range may bring more values to where they do.
FLOAT_FACTORS = (1.0, 1.5, 1.35, 1.2, 1.1, 0.94, 0.88, 0.8)
# Scales that are powers of two: as they are, or one less.
POWER_FACTORS = (1.0, 0.5)


def minmax_parameters(
    weight: Tensor, args: QuantizationArgs, dtype: torch.dtype, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grids that span each group from its least to its greatest value.

    Args:
        weight: (..., out, in), float32.
        args: the scheme.
        dtype: that of the weight, and of its scales.
        global_scale: (1,), float32: what scales are relative to, where the scheme has one.

    Returns:
        Scale (``dtype``) and zero point (int8), of the shapes, behind the leading dimensions, (1,) per tensor, (out, 1)
        per channel, (out, groups) per group, (row blocks, column blocks) per block.
    """
    return affine_parameters(*weight_ranges(weight, args), args, dtype, global_scale)


def weight_ranges(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each group of ``weight``; shapes as :func:`minmax_parameters`."""
    if args.strategy == QuantizationStrategy.TENSOR:
        view = weight.flatten(-2)
        return view.amin(-1, keepdim=True), view.amax(-1, keepdim=True)
    block = block_shape(args)
    if block is not None:
        rows, columns = block
        blocks = padded(weight, block).unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
        return blocks.amin((-3, -1)), blocks.amax((-3, -1))
    # Two vectorized passes: on a CPU four times as fast as aminmax, which is not.
    view = group_view(weight, args)
    return view.amin(-1), view.amax(-1)


def search_parameters(
    weight: Tensor,
    args: QuantizationArgs,
    gram: Tensor | None,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
    factors: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Ranges that are shrunk where clipping a few values costs less than it gains: AWQ's clip, without its forwards.

    On a grid of floats, whose points are not evenly spaced, they may also be widened.

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
        dtype: that of the weight, and of its scales.
        global_scale: (1,), float32: what scales are relative to, where the scheme has one.
        factors: those that are tried, the first of which should be 1; by default what the kind of grid needs.

    Returns:
        Scale and zero point as :func:`minmax_parameters` gives them.
    """
    weight = weight.float()
    factors = factors or range_factors(args)
    gram = weight.new_ones(weight.shape[1]) if gram is None else gram
    block = block_shape(args)
    if block is not None:
        # Zeros are on every grid: they cost nothing.
        weight = padded(weight, block)
        gram = padded(gram.unsqueeze(0), (1, block[1]))[0] if gram.dim() == 1 else padded(gram, (block[1], block[1]))
    height = block[0] if block else 1
    size = block[1] if block else args.group_size if args.strategy in GROUPED else weight.shape[1]
    search = _Search(args, _blocks(gram, size), dtype, global_scale, factors, height)
    parts = weight.split(max(1, SEARCH_CHUNK // weight.shape[1] // height) * height)
    if args.strategy == QuantizationStrategy.TENSOR:
        return search.of_all(parts, *weight_ranges(weight, args))
    found = [search.of_rows(rows) for rows in parts]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero_point for _, zero_point in found])


def range_factors(args: QuantizationArgs) -> tuple[float, ...]:
    """What :func:`search_parameters` multiplies ranges by."""
    if args.type == QuantizationType.INT:
        return SHRINKS
    return POWER_FACTORS if scale_kind(args) == ScaleKind.POWER else FLOAT_FACTORS


def _blocks(gram: Tensor, size: int) -> Tensor:
    """The blocks of a matrix along its diagonal, (groups, size, size); of a diagonal, (groups, size, 1)."""
    if gram.dim() == 1:
        return gram.view(-1, size, 1)
    return torch.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])


@dataclass(frozen=True)
class _Search:
    """One search: ``measure`` is as :func:`_blocks` gives it, and ``height`` rows share a range."""

    args: QuantizationArgs
    measure: Tensor
    dtype: torch.dtype
    global_scale: Tensor | None
    factors: Sequence[float]
    height: int

    def of_all(self, parts: Sequence[Tensor], minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """One range for all rows."""
        costs = [torch.stack([c.sum() for c in self._costs(self._grouped(rows), minimum, maximum)]) for rows in parts]
        factor = self.factors[int(torch.stack(costs).sum(0).argmin())]
        return affine_parameters(minimum * factor, maximum * factor, self.args, self.dtype, self.global_scale)

    def of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A range for each group of some rows."""
        view = self._grouped(rows)
        joined = self._joined(view)
        minimum, maximum = joined.amin(-1), joined.amax(-1)
        least = torch.full_like(minimum, math.inf)
        chosen = torch.ones_like(minimum)
        for factor, cost in zip(self.factors, self._costs(view, minimum, maximum), strict=True):
            chosen.masked_fill_(cost < least, factor)
            torch.minimum(cost, least, out=least)
        found = affine_parameters(minimum * chosen, maximum * chosen, self.args, self.dtype, self.global_scale)
        return found[0].T.contiguous(), found[1].T.contiguous()

    def _grouped(self, rows: Tensor) -> Tensor:
        view: Tensor = rows.unflatten(-1, (-1, self.measure.shape[1])).transpose(0, 1).contiguous()
        return view

    def _joined(self, view: Tensor) -> Tensor:
        """Groups and the rows that share their ranges: a view of the same numbers, in which a range is one row."""
        return view.view(view.shape[0], -1, self.height * view.shape[-1])

    def _costs(self, view: Tensor, minimum: Tensor, maximum: Tensor) -> Iterator[Tensor]:
        """The error of each range, (groups, ranges), with each of the factors."""
        error, scratch, product = torch.empty_like(view), torch.empty_like(view), torch.empty_like(view)
        joined, out, spare = self._joined(view), self._joined(error), self._joined(scratch)
        for factor in self.factors:
            s, z = affine_floats(minimum * factor, maximum * factor, self.args, self.dtype, self.global_scale)
            off_grid(joined, s.unsqueeze(-1), z.unsqueeze(-1), self.args, out=out, scratch=spare)
            if self.measure.shape[-1] == 1:
                of_rows = torch.bmm(error.square_(), self.measure)
            else:
                of_rows = torch.bmm(error, self.measure, out=product).mul_(error)
            # In steps; a group's error is its scale times that.
            yield of_rows.view(len(view), joined.shape[1], -1).sum(-1).mul_(s).mul_(s)


def round_to_nearest(
    weight: Tensor,
    args: QuantizationArgs,
    dtype: torch.dtype,
    ranges: tuple[Tensor, Tensor] | None = None,
    global_scale: Tensor | None = None,
) -> QuantizedWeight:
    """Each value to the nearest point of its group's grid.

    Args:
        weight: (out, in), any float dtype; rounded in float32.
        args: the scheme.
        dtype: that of the weight, and of its scales.
        ranges: scale and zero point, of the shapes that :func:`minmax_parameters` gives; by default its own.
        global_scale: (1,), float32: what scales are relative to; by default, where the scheme has one, the weight's.
    """
    weight = weight.float()
    if global_scale is None and has_global_scale(args):
        global_scale = shared_global_scale([weight], args)
    scale, zero_point = minmax_parameters(weight, args, dtype, global_scale) if ranges is None else ranges
    return QuantizedWeight.on_grid(weight, scale, zero_point, args, global_scale)


def check_finite(weight: Tensor, name: str) -> None:
    """Refuse a weight with NaN or infinite values.

    Args:
        weight: any shape and float dtype.
        name: of its layer, for the error.

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
