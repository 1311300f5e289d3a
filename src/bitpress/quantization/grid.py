"""Grids of integers or small floats: values to points and back.

A weight is (out, in). Its scale and zero point are (1,) per tensor, (out, 1) per channel, (out, in / group_size) per
group and (row blocks, column blocks) per block, the last of which may be smaller, as in compressed-tensors. The
arithmetic, operation for operation, is that of compressed-tensors' ``fake_quantize``; it is done in place, on rows that
fit the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor, nn

from bitpress.errors import BitpressError

# Elements that one step works on: a few float32 copies of it stay in a core's second-level cache.
CHUNK = 1 << 17
# The same for a search, which runs over it many times: large enough that calling the kernels costs little.
SEARCH_CHUNK = 1 << 19

GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)


@dataclass(frozen=True)
class Floats:
    """Small floats: the bits of the mantissa, the exponent of the least normal number, the greatest number."""

    mantissa: int
    exponent: int
    greatest: float


# By their bits: e2m1, e2m3 and e4m3, none with infinities.
FLOATS = {4: Floats(1, 0, 6.0), 6: Floats(3, 0, 7.5), 8: Floats(3, -6, 448.0)}


def integer_range(args: QuantizationArgs) -> tuple[int, int]:
    """The least and the greatest integer of a signed grid, by ``args``: ``-2^(b-1)`` and ``2^(b-1) - 1``."""
    half = 1 << (args.num_bits - 1)
    return -half, half - 1


def limits(args: QuantizationArgs) -> tuple[float, float]:
    """The least and the greatest point of the grid of ``args``, integers or floats."""
    if args.type == QuantizationType.INT:
        return integer_range(args)
    greatest = FLOATS[args.num_bits].greatest
    return -greatest, greatest


def points_dtype(args: QuantizationArgs) -> torch.dtype:
    """What holds a point of ``args`` in a byte: int8, or float8_e4m3fn, which has the floats of 4 and 6 bits too."""
    return torch.int8 if args.type == QuantizationType.INT else torch.float8_e4m3fn


def round_to_points(x: Tensor, args: QuantizationArgs) -> Tensor:
    """Each value to the nearest point of the grid, ties to the even one, *in place*; beyond its ends, to these.

    Args:
        x: float, any shape: values that have been divided by their scales, their zero points added.
        args: type and bits.

    Returns:
        ``x``.
    """
    x.clamp_(*limits(args))
    if args.type == QuantizationType.INT:
        return x.round_()
    if x.dtype != torch.float32:
        return x.copy_(round_to_points(x.float(), args))
    floats = FLOATS[args.num_bits]
    # 1.5 * 2^23 steps: a sum with it has no bits for less than a step, and so is rounded to one.
    anchor = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=(127 + floats.exponent) << 23)
    anchor = anchor.add_(((23 - floats.mantissa) << 23) | 0x400000).view(torch.float32)
    return x.add_(anchor).sub_(anchor)


def group_view(x: Tensor, args: QuantizationArgs) -> Tensor:
    """(out, in) seen as (out, groups, group size); strategies without groups have one, all of the row."""
    if args.strategy not in GROUPED:
        return x.unsqueeze(-2)
    if x.shape[-1] % args.group_size:
        raise BitpressError(f"group_size {args.group_size} does not divide the {x.shape[-1]} columns of the weight.")
    view: Tensor = x.unflatten(-1, (-1, args.group_size))
    return view


def block_shape(args: QuantizationArgs) -> tuple[int, int] | None:
    """Rows and columns that share a scale, of a scheme with blocks."""
    if args.strategy != QuantizationStrategy.BLOCK:
        return None
    rows, columns = args.block_structure
    return rows, columns


def padded(x: Tensor, block: tuple[int, int]) -> Tensor:
    """``x`` (..., out, in) with zeros behind its rows and columns, as many as fill the last blocks."""
    rows, columns = -x.shape[-2] % block[0], -x.shape[-1] % block[1]
    return nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x


def spread(parameters: Tensor, shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """Parameters of blocks, (row blocks, column blocks), for each value of a weight of ``shape`` (out, in)."""
    return parameters.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def beside(x: Tensor, parameters: Sequence[Tensor], args: QuantizationArgs) -> tuple[Tensor, list[Tensor]]:
    """A view of ``x`` (out, in), and parameters of its groups in shapes that broadcast against it."""
    block = block_shape(args)
    if block is not None:
        return x, [spread(p, x.shape, block) for p in parameters]
    return group_view(x, args), [p.unsqueeze(-1) for p in parameters]


def _row_chunks(
    x: Tensor, out: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Some rows of ``x`` and ``out`` at a time, with the scale and zero point that broadcast against them."""
    block = block_shape(args)
    if block is not None:
        # A column of blocks is a tensor whose rows have a scale each.
        rows, columns = x.shape[0], block[1]
        for i, (part, out_part) in enumerate(zip(x.split(columns, 1), out.split(columns, 1), strict=True)):
            of_rows = [p[:, i].repeat_interleave(block[0])[:rows].reshape(-1, 1, 1) for p in _given(scale, zero_point)]
            yield from _chunks(part.unsqueeze(1), out_part.unsqueeze(1), of_rows)
        return
    view = group_view(x, args)
    shape = (1, 1, 1) if scale.numel() == 1 else (view.shape[0], -1, 1)
    yield from _chunks(view, group_view(out, args), [p.reshape(shape) for p in _given(scale, zero_point)])


def _given(scale: Tensor, zero_point: Tensor | None) -> list[Tensor]:
    return [scale] if zero_point is None else [scale, zero_point]


def _chunks(
    view: Tensor, out: Tensor, parameters: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    step = max(1, CHUNK // max(1, view[:1].numel()))
    for start in range(0, view.shape[0], step):
        rows = slice(start, start + step)
        s, *z = (p if p.shape[0] == 1 else p[rows] for p in parameters)
        yield view[rows], out[rows], s, z[0] if z else None


def _to_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs, out: Tensor | None = None
) -> Tensor:
    scaled = torch.div(x, scale, out=out)
    if zero_point is not None:
        scaled += zero_point.to(x.dtype)
    return round_to_points(scaled, args)


def _from_grid(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    q = q.to(scale.dtype)
    if zero_point is not None:
        q.sub_(zero_point.to(scale.dtype))
    return q.mul_(scale)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs, out: Tensor | None = None
) -> Tensor:
    """Round ``x`` to its grid and return the values of the grid points.

    Value for value the result of compressed-tensors' ``fake_quantize``, in every float dtype.

    Args:
        x: (out, in), float.
        scale: float; see the module's docstring for the shapes.
        zero_point: integers of ``scale``'s shape, or None for 0.
        args: bits and strategy.
        out: (out, in) to write to; made if None. May be ``x`` itself.

    Returns:
        (out, in) of ``x``'s dtype.
    """
    out = torch.empty_like(x) if out is None else out
    in_place = x.dtype == scale.dtype == out.dtype
    for part, out_part, s, z in _row_chunks(x, out, scale, zero_point, args):
        if in_place:
            _from_grid(_to_grid(part, s, z, args, out=out_part), s, z)
        else:
            out_part.copy_(_from_grid(_to_grid(part, s, z, args).to(x.dtype), s, z))
    return out


def off_grid(
    view: Tensor, scale: Tensor, zero_point: Tensor, args: QuantizationArgs, out: Tensor, scratch: Tensor
) -> Tensor:
    """How far values are from their grid points, in steps: ``(q - zero_point) - x / scale``, for searches.

    The integers q are those of :func:`quantize`.

    Args:
        view: float32, any shape.
        scale: float32, broadcasts against ``view``.
        zero_point: float32, the shape of ``scale``.
        args: the bits.
        out: the shape of ``view``; may be ``view`` itself. Written to and returned.
        scratch: the shape of ``view``; overwritten.
    """
    torch.div(view, scale, out=scratch).add_(zero_point)
    if args.type != QuantizationType.INT:
        return round_to_points(out.copy_(scratch), args).sub_(scratch)
    return torch.round(scratch, out=out).clamp_(*integer_range(args)).sub_(scratch)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs) -> Tensor:
    """The points of ``x`` on its grid.

    Args:
        x: (out, in), float.
        scale: float; see the module's docstring for the shapes.
        zero_point: integers of ``scale``'s shape, or None for 0.
        args: bits and strategy.

    Returns:
        (out, in), of :func:`points_dtype`.
    """
    out = torch.empty_like(x, dtype=points_dtype(args))
    for part, out_part, s, z in _row_chunks(x, out, scale, zero_point, args):
        out_part.copy_(_to_grid(part, s, z, args))
    return out


def dequantize(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    args: QuantizationArgs,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The values of points: (values - zero_point) * scale, in ``scale``'s dtype, as every reader computes it.

    Args:
        values: (out, in), of :func:`points_dtype`.
        scale: float; see the module's docstring for the shapes.
        zero_point: integers of ``scale``'s shape, or None for 0.
        args: bits and strategy.
        dtype: where it is another than ``scale``'s, what the values are rounded to at last.

    Returns:
        (out, in) of ``dtype``, or ``scale``'s.
    """
    out = torch.empty_like(values, dtype=dtype or scale.dtype)
    for part, out_part, s, z in _row_chunks(values, out, scale, zero_point, args):
        out_part.copy_(_from_grid(part, s, z))
    return out
