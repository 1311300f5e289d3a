"""Ranges to scales and zero points, each rounded to the precision in which it is stored.

Three kinds of scales are stored. Most grids have one in the weight's own dtype. Microscaling grids (MXFP4, MXFP6,
MXFP8) have a power of two, of which the exponent is stored (e8m0). NVFP4 has 8-bit floats (e4m3) that are relative to a
global scale, one float32 a tensor: a step of the grid is scale / global scale.
"""

import math
from collections.abc import Sequence
from enum import Enum

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor

from bitpress.quantization.grid import limits

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
# What compressed-tensors puts in place of a scale of 0, so that nothing is divided by it.
LEAST_E4M3 = 0.125
_EXPONENT_BITS = 0x7F800000
_MANTISSA_BITS = 23
# A range this much (in units of the mantissa) below a power of two counts as that power: as compressed-tensors rounds.
_ROUND_UP = {4: 1 << (_MANTISSA_BITS - 2), 6: 1 << (_MANTISSA_BITS - 4), 8: 1 << (_MANTISSA_BITS - 2)}


class ScaleKind(Enum):
    """What the scales of a weight's groups are stored as."""

    PLAIN = "in the weight's dtype"
    POWER = "the exponents of powers of two"
    GLOBAL = "8-bit floats, relative to a global scale"


def scale_kind(args: QuantizationArgs) -> ScaleKind:
    """What the scheme's scales are stored as."""
    floats = args.type == QuantizationType.FLOAT
    if floats and args.strategy == QuantizationStrategy.GROUP and args.group_size == 32:
        return ScaleKind.POWER if args.scale_dtype == torch.uint8 else ScaleKind.PLAIN
    nvfp4 = floats and args.num_bits == 4 and args.strategy == QuantizationStrategy.TENSOR_GROUP
    return ScaleKind.GLOBAL if nvfp4 and args.group_size == 16 and args.scale_dtype == E4M3 else ScaleKind.PLAIN


def has_global_scale(args: QuantizationArgs) -> bool:
    """True if the scales of a scheme (``args``) are relative to one of the whole tensor: NVFP4's."""
    return scale_kind(args) == ScaleKind.GLOBAL


def shared_global_scale(weights: Sequence[Tensor], args: QuantizationArgs) -> Tensor:
    """The global scale that weights, fused by servers into one, must share.

    The greatest magnitude of all has the greatest scale: ``448 * 6 / max(abs(W))``.

    Args:
        weights: (out_i, in), any float dtype.
        args: their scheme.

    Returns:
        (1,), float32.
    """
    return global_scale_of(torch.stack([w.abs().amax().float() for w in weights]).amax().reshape(1), args)


def global_scale_of(magnitude: Tensor, args: QuantizationArgs) -> Tensor:
    """The global scale of a tensor by its greatest magnitude; both float32, of one shape."""
    magnitude = magnitude.clamp(min=torch.finfo(torch.float32).tiny)
    return (E4M3_MAX * limits(args)[1] / magnitude).nan_to_num(1.0, 1.0, 1.0)


def step_sizes(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """How far apart the points 0 and 1 of each grid are: of the shape of ``scale``, in units of the weight.

    It is ``scale`` itself, or, in float32, its quotient by ``global_scale`` (1,) where there is one.
    """
    return scale if global_scale is None else scale.float() / global_scale


def affine_parameters(
    minimum: Tensor, maximum: Tensor, args: QuantizationArgs, dtype: torch.dtype, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that spans [minimum, maximum] and holds 0.

    The scale is rounded to the precision it is stored in *before* the zero point is taken from it.

    Args:
        minimum: float32, any shape.
        maximum: the same shape.
        args: bits and symmetry.
        dtype: that of the weight, and of the scale where it is stored in no other.
        global_scale: (1,), float32, of a scheme that has one.

    Returns:
        scale (``dtype``, > 0; its values are those that are stored) and zero point (int8), both of ``minimum``'s shape.
    """
    scale, zero_point = _parameters(minimum, maximum, args, dtype, global_scale)
    return scale.to(dtype), zero_point.to(torch.int8)


def affine_floats(
    minimum: Tensor, maximum: Tensor, args: QuantizationArgs, dtype: torch.dtype, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Step sizes and zero points of :func:`affine_parameters` in float32, for searches."""
    scale, zero_point = _parameters(minimum, maximum, args, dtype, global_scale)
    return (scale if global_scale is None else scale.div_(global_scale)), zero_point


def _parameters(
    minimum: Tensor, maximum: Tensor, args: QuantizationArgs, dtype: torch.dtype, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In float32: the scale's stored value, and the zero point."""
    q_min, q_max = limits(args)
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    kind = scale_kind(args)
    if kind != ScaleKind.PLAIN:
        greatest = torch.maximum(-minimum, maximum)
        stored = _powers(greatest, args, dtype) if kind == ScaleKind.POWER else _e4m3(greatest, q_max, global_scale)
        return stored, torch.zeros_like(stored)
    span = torch.maximum(-minimum, maximum).mul_(2) if args.symmetric else maximum.sub_(minimum)
    scale = span.div_(q_max - q_min)
    of_dtype = torch.finfo(dtype)
    scale = scale.clamp_(max=of_dtype.max)
    if dtype != scale.dtype:
        scale = scale.to(dtype).to(scale.dtype)
    scale.masked_fill_(scale == 0, of_dtype.eps)
    if args.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, minimum.div_(scale).neg_().add_(q_min).round_().clamp_(q_min, q_max)


def _powers(greatest: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> Tensor:
    """The powers of two that bring ``greatest`` to the grid's last binade, as compressed-tensors rounds them."""
    bits = greatest.view(torch.int32).add(_ROUND_UP[args.num_bits]).bitwise_and_(_EXPONENT_BITS)
    power = bits.view(torch.float32).mul_(2.0 ** -math.floor(math.log2(limits(args)[1])))
    of_dtype = torch.finfo(dtype)
    # 2^-127 could be stored, but is no normal number: a device may take it for 0.
    least = max(2.0**-126, of_dtype.smallest_normal * of_dtype.eps)
    return power.clamp_(least, 2.0 ** math.floor(math.log2(of_dtype.max)))


def _e4m3(greatest: Tensor, q_max: float, global_scale: Tensor | None) -> Tensor:
    if global_scale is None:
        raise ValueError("a scheme of strategy tensor_group needs the tensor's global scale")
    scale = greatest.div_(q_max).mul_(global_scale).clamp_(max=E4M3_MAX).to(E4M3).float()
    return scale.masked_fill_(scale == 0, LEAST_E4M3)


def nearest_scale(steps: Tensor, dtype: torch.dtype, global_scale: Tensor | None) -> Tensor:
    """The scale that can be stored whose steps (float32, > 0) are nearest to these: ``dtype``, > 0, of their shape.

    Not for scales that are powers of two.
    """
    if global_scale is not None:
        scale = (steps * global_scale).clamp_(max=E4M3_MAX).to(E4M3).float()
        return scale.masked_fill_(scale == 0, LEAST_E4M3).to(dtype)
    of_dtype = torch.finfo(dtype)
    return steps.clamp(of_dtype.tiny, of_dtype.max).to(dtype)


def stored_scale(scale: Tensor, args: QuantizationArgs) -> Tensor:
    """The tensor that a checkpoint holds of a scale: nothing is lost, its values are those that can be stored."""
    match scale_kind(args):
        case ScaleKind.POWER:
            return (scale.float().view(torch.int32) >> _MANTISSA_BITS).to(torch.uint8)
        case ScaleKind.GLOBAL:
            return scale.to(E4M3)
    return scale


def read_scale(stored: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> Tensor:
    """The scale again, in ``dtype`` where it is not stored in the weight's own."""
    match scale_kind(args):
        case ScaleKind.POWER:
            return (stored.int() << _MANTISSA_BITS).view(torch.float32).to(dtype)
        case ScaleKind.GLOBAL:
            return stored.to(dtype)
    return stored
