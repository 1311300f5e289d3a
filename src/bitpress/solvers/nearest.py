"""Round-to-nearest straight to the packed form, in few passes over rows that fit the cache."""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor

from bitpress.quantization.grid import block_shape, group_view, points_dtype, round_to_points
from bitpress.quantization.packing import fills_words, pack_in_place, pack_points
from bitpress.quantization.scales import affine_parameters, has_global_scale, shared_global_scale, step_sizes
from bitpress.quantization.weights import PackedWeight, QuantizedWeight
from bitpress.solvers.ranges import check_finite, round_to_nearest

# The error that is reported is an estimate from some rows of every so many.
SAMPLED_ROWS = 16
# Values in float32 that one step works on: they stay in the cache, and are enough for the calls not to count.
AT_ONCE = 1 << 19


def packed_to_nearest(
    weight: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None, name: str = "the layer"
) -> tuple[PackedWeight, float]:
    """What :func:`round_to_nearest` gives, packed, bit for bit, and several times as fast.

    Args:
        weight: (out, in), any float dtype.
        args: the scheme.
        global_scale: (1,), float32: what scales are relative to; by default, where the scheme has one, the weight's.
        name: of the layer, for errors.

    Returns:
        The weight's packed form, and the squared error relative to the weight's energy, by one row in sixteen.

    Raises:
        BitpressError: the weight holds NaN or infinite values.
    """
    if global_scale is None and has_global_scale(args):
        global_scale = shared_global_scale([weight], args)
    if block_shape(args) is not None or not weight.numel():
        check_finite(weight, name)
        quantized = round_to_nearest(weight, args, weight.dtype, None, global_scale)
        return quantized.pack(), relative_error(quantized.dequantize(), weight)
    rows, columns = weight.shape
    step = max(1, AT_ONCE // columns)
    scratch = torch.empty(min(rows, step), columns, device=weight.device)
    scale, zero_point = _grid(weight, args, global_scale, scratch, name)
    of_tensor = args.strategy == QuantizationStrategy.TENSOR
    divisor, offset = step_sizes(scale, global_scale).float().unsqueeze(-1), zero_point.float().unsqueeze(-1)
    points = torch.zeros(scratch.shape, dtype=points_dtype(args), device=weight.device)
    in_place = args.type == QuantizationType.INT and fills_words(args.num_bits, columns)
    one_row, spare = pack_points(points[:1], args), torch.empty_like(points)
    packed = one_row.new_empty(rows, one_row.shape[1])
    every_view = group_view(scratch, args)
    kept = []
    for start in range(0, rows, step):
        of_rows = slice(None) if of_tensor else slice(start, start + step)
        given = weight[start : start + step]
        part, view = scratch[: len(given)].copy_(given), every_view[: len(given)]
        view.div_(divisor[of_rows])
        if not args.symmetric:
            view.add_(offset[of_rows])
        found = points[: len(part)].copy_(round_to_points(part, args))
        kept.append(found[-start % SAMPLED_ROWS :: SAMPLED_ROWS].clone())
        words = packed[start : start + step]
        if in_place:
            pack_in_place(found, args.num_bits, words, spare)
        else:
            words.copy_(pack_points(found, args))
    whole = PackedWeight(packed, (rows, columns), scale, zero_point, args, global_scale)
    every = slice(None, None, SAMPLED_ROWS)
    at_scale, at_zero = (scale, zero_point) if of_tensor else (scale[every], zero_point[every])
    sampled = QuantizedWeight(torch.cat(kept), at_scale, at_zero, args, global_scale)
    return whole, relative_error(sampled.dequantize(), weight[every])


def relative_error(values: Tensor, weight: Tensor) -> float:
    """The squared error of ``values`` relative to the energy of ``weight``."""
    exact = weight.float()
    energy = exact.square().sum().clamp(min=1e-30)
    return float((values - exact).square_().sum() / energy)


def _grid(
    weight: Tensor, args: QuantizationArgs, global_scale: Tensor | None, scratch: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, of the ranges that the values have.

    Raises:
        BitpressError: the weight holds NaN or infinite values.
    """
    every_view = group_view(scratch, args)
    ranges = []
    for rows in weight.split(len(scratch)):
        scratch[: len(rows)].copy_(rows)
        view = every_view[: len(rows)]
        ranges.append((view.amin(-1), view.amax(-1)))
    low, high = (torch.cat(each) for each in zip(*ranges, strict=True))
    # NaN and infinities are in the ranges of their groups: the weight itself need not be looked at.
    if not bool((high - low).sum().isfinite()):
        check_finite(weight, name)
    if args.strategy == QuantizationStrategy.TENSOR:
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    return affine_parameters(low, high, args, weight.dtype, global_scale)
