"""Round-to-nearest straight to the packed form, in few passes over rows that fit the cache."""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from bitpress.quantization.grid import block_shape, group_view, points_dtype, round_to_points
from bitpress.quantization.packing import pack_points
from bitpress.quantization.scales import affine_parameters, has_global_scale, shared_global_scale, step_sizes
from bitpress.quantization.weights import PackedWeight, QuantizedWeight
from bitpress.solvers.ranges import check_finite, round_to_nearest, weight_ranges

# The error that is reported is an estimate from some rows of every so many.
SAMPLED_ROWS = 16
# Values in float32 that one step works on; fewer would cost more in calls than they save by staying in the cache.
AT_ONCE = 1 << 19


def packed_to_nearest(
    weight: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None, name: str = "the layer"
) -> tuple[PackedWeight, float]:
    """What ``round_to_nearest(weight, args, weight.dtype).pack()`` gives, bit for bit, several times as fast.

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
    if block_shape(args) is not None or args.strategy == QuantizationStrategy.TENSOR or not weight.numel():
        check_finite(weight, name)
    if block_shape(args) is not None or not weight.numel():
        quantized = round_to_nearest(weight, args, weight.dtype, None, global_scale)
        return quantized.pack(), relative_error(quantized.dequantize(), weight)
    given = _of_all(weight, args, global_scale) if args.strategy == QuantizationStrategy.TENSOR else None
    rows, columns = weight.shape
    step = max(1, AT_ONCE // columns)
    scratch = torch.empty(min(rows, step), columns, device=weight.device)
    points = torch.empty(scratch.shape, dtype=points_dtype(args), device=weight.device)
    packed, scales, zero_points, kept = [], [], [], []
    for start in range(0, rows, step):
        given_rows = weight[start : start + step]
        part = scratch[: len(given_rows)].copy_(given_rows)
        view = group_view(part, args)
        if given is None:
            low, high = view.amin(-1), view.amax(-1)
            _check(low, high, weight, name)
            scale, zero_point = affine_parameters(low, high, args, weight.dtype, global_scale)
            scales.append(scale)
            zero_points.append(zero_point)
        else:
            scale, zero_point = given
        view.div_(step_sizes(scale, global_scale).float().unsqueeze(-1))
        if not args.symmetric:
            view.add_(zero_point.float().unsqueeze(-1))
        found = points[: len(part)].copy_(round_to_points(part, args))
        packed.append(pack_points(found, args))
        kept.append(found[-start % SAMPLED_ROWS :: SAMPLED_ROWS].clone())
        if packed[-1].data_ptr() == found.data_ptr():
            packed[-1] = found.clone()
    scale, zero_point = given or (torch.cat(scales), torch.cat(zero_points))
    whole = PackedWeight(torch.cat(packed), (rows, columns), scale, zero_point, args, global_scale)
    every = slice(None, None, SAMPLED_ROWS)
    at_scale, at_zero = (scale, zero_point) if given else (scale[every], zero_point[every])
    sampled = QuantizedWeight(torch.cat(kept), at_scale, at_zero, args, global_scale)
    return whole, relative_error(sampled.dequantize(), weight[every])


def relative_error(values: Tensor, weight: Tensor) -> float:
    """The squared error of ``values`` relative to the energy of ``weight``."""
    exact = weight.float()
    energy = exact.square().sum().clamp(min=1e-30)
    return float((values - exact).square_().sum() / energy)


def _of_all(weight: Tensor, args: QuantizationArgs, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """One scale and zero point for all of the weight."""
    ranges = [weight_ranges(rows.float(), args) for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))]
    low, high = (torch.cat(each) for each in zip(*ranges, strict=True))
    return affine_parameters(low.amin().reshape(1), high.amax().reshape(1), args, weight.dtype, global_scale)


def _check(low: Tensor, high: Tensor, weight: Tensor, name: str) -> None:
    """NaN and infinities are in the ranges of their groups: the weight itself need not be looked at."""
    if not bool((high - low).sum().isfinite()):
        check_finite(weight, name)
