"""Uniform integer grids: ranges to scale and zero point, values to integers and back.

A weight is (out, in). Its scale and zero point are (1,) per tensor, (out, 1) per channel and
(out, in / group_size) per group, as in compressed-tensors. The arithmetic, operation for operation, is that of
compressed-tensors' ``fake_quantize``; it is done in place, on rows that fit the cache.
"""

from collections.abc import Iterator

import torch
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor

from bitpress.errors import BitpressError

# Elements that one step works on: a few float32 copies of it stay in a core's second-level cache.
CHUNK = 1 << 17
# The same for a search, which runs over it many times: large enough that calling the kernels costs little.
SEARCH_CHUNK = 1 << 19

WEIGHT_STRATEGIES = (QuantizationStrategy.TENSOR, QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)


def check_supported(args: QuantizationArgs) -> None:
    """Refuse weight grids that are not integers of 2 to 8 bits per tensor, channel or group.

    Raises:
        BitpressError: names the field and the values that work.
    """
    if args.type != QuantizationType.INT or not 2 <= args.num_bits <= 8:
        kind = QuantizationType(args.type).value
        raise BitpressError(
            f"weights: type {kind} with num_bits {args.num_bits} is not supported; use type int with num_bits 2 to 8."
        )
    if args.strategy not in WEIGHT_STRATEGIES:
        names = ", ".join(s.value for s in WEIGHT_STRATEGIES)
        raise BitpressError(f"weights: strategy {args.strategy} is not supported; use one of {names}.")
    if args.dynamic:
        raise BitpressError("weights: dynamic=True is for activations; weights have dynamic=False.")
    if args.actorder in (ActivationOrdering.GROUP, ActivationOrdering.DYNAMIC):
        raise BitpressError(f'weights: actorder {args.actorder.value!r} is not supported; use "static".')


def integer_range(args: QuantizationArgs) -> tuple[int, int]:
    """The least and the greatest integer of a signed grid of ``args.num_bits`` bits."""
    half = 1 << (args.num_bits - 1)
    return -half, half - 1


def affine_parameters(
    minimum: Tensor, maximum: Tensor, args: QuantizationArgs, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that spans [minimum, maximum] and holds 0.

    The scale is rounded to ``dtype``, the precision it is stored in, *before* the zero point is taken from it.

    Args:
        minimum: float32, any shape.
        maximum: the same shape.
        args: bits and symmetry.
        dtype: the stored dtype of the scale.

    Returns:
        scale (``dtype``, > 0) and zero point (int8), both of ``minimum``'s shape.
    """
    scale, zero_point = affine_floats(minimum, maximum, args, dtype)
    return scale.to(dtype), zero_point.to(torch.int8)


def affine_floats(
    minimum: Tensor, maximum: Tensor, args: QuantizationArgs, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The values of :func:`affine_parameters` in float32, for searches."""
    q_min, q_max = integer_range(args)
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    span = torch.maximum(-minimum, maximum).mul_(2) if args.symmetric else maximum.sub_(minimum)
    scale = span.div_(q_max - q_min)
    limits = torch.finfo(dtype)
    scale = scale.clamp_(max=limits.max)
    if dtype != scale.dtype:
        scale = scale.to(dtype).to(scale.dtype)
    scale.masked_fill_(scale == 0, limits.eps)
    if args.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, minimum.div_(scale).neg_().add_(q_min).round_().clamp_(q_min, q_max)


def group_view(x: Tensor, args: QuantizationArgs) -> Tensor:
    """(out, in) seen as (out, groups, group size); other strategies have one group, all of the row."""
    if args.strategy != QuantizationStrategy.GROUP:
        return x.unsqueeze(-2)
    if x.shape[-1] % args.group_size:
        raise BitpressError(f"group_size {args.group_size} does not divide the {x.shape[-1]} columns of the weight.")
    view: Tensor = x.unflatten(-1, (-1, args.group_size))
    return view


def _row_chunks(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Rows of the group view with the scale and zero point that broadcast against them."""
    view = group_view(x, args)
    shared = scale.numel() == 1
    scale = scale.reshape(1, 1, 1) if shared else scale.reshape(view.shape[0], -1, 1)
    if zero_point is not None:
        zero_point = zero_point.reshape(scale.shape)
    step = max(1, CHUNK // max(1, x.shape[-1]))
    for start in range(0, view.shape[0], step):
        rows = slice(start, start + step)
        of_rows = slice(None) if shared else rows
        yield rows, view[rows], scale[of_rows], None if zero_point is None else zero_point[of_rows]


def _to_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs, out: Tensor | None = None
) -> Tensor:
    q_min, q_max = integer_range(args)
    scaled = torch.div(x, scale, out=out)
    if zero_point is not None:
        scaled += zero_point.to(x.dtype)
    return scaled.clamp_(q_min, q_max).round_()


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
    out_view = group_view(out, args)
    in_place = x.dtype == scale.dtype == out.dtype
    for rows, part, s, z in _row_chunks(x, scale, zero_point, args):
        if in_place:
            _from_grid(_to_grid(part, s, z, args, out=out_view[rows]), s, z)
        else:
            out_view[rows] = _from_grid(_to_grid(part, s, z, args).to(x.dtype), s, z)
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
    return torch.round(scratch, out=out).clamp_(*integer_range(args)).sub_(scratch)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs) -> Tensor:
    """The integers of ``x`` on its grid: int8, the shape of ``x``. Arguments as :func:`fake_quantize`."""
    out = torch.empty_like(x, dtype=torch.int8)
    out_view = group_view(out, args)
    for rows, part, s, z in _row_chunks(x, scale, zero_point, args):
        out_view[rows] = _to_grid(part, s, z, args).to(torch.int8)
    return out


def dequantize(values: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs) -> Tensor:
    """The grid points of integers: (values - zero_point) * scale, in ``scale``'s dtype, as every reader computes it."""
    out = torch.empty_like(values, dtype=scale.dtype)
    out_view = group_view(out, args)
    for rows, part, s, z in _row_chunks(values, scale, zero_point, args):
        out_view[rows] = _from_grid(part, s, z)
    return out
