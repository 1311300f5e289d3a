"""Grids of activations: which of them readers follow, and the scales of those that are not taken at run time.

An activation is quantized while the model runs, by compressed-tensors' own ``forward_quantize``. Its scale is taken
from the values at hand (``dynamic=True``), from calibration (``False``), or, of groups, from both (``"local"``: the
groups' scales are relative to a global one).
"""

import torch
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.quantization.scales import affine_parameters

FLOAT_BITS = (4, 6, 8)
# Names of the one way in which static ranges are found here: from the least to the greatest value.
MINMAX = (None, "minmax", "static_minmax", "memoryless_minmax")
GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
# What may be static, with an argument of the scheme that says where it stands.
OF_LAYERS = (QuantizationStrategy.TENSOR,)
OF_ATTENTION = (QuantizationStrategy.TENSOR, QuantizationStrategy.ATTN_HEAD)


def is_static(args: QuantizationArgs | None) -> bool:
    """True if calibration has a share in the scale of an activation: ``args.dynamic`` is False or "local"."""
    return args is not None and args.dynamic is not True


def quantizes_activations(scheme: QuantizationScheme) -> bool:
    """True if ``scheme`` is not of weights only."""
    return scheme.input_activations is not None or scheme.output_activations is not None


def check_activations(args: QuantizationArgs, static: tuple[QuantizationStrategy, ...] = OF_LAYERS) -> None:
    """Refuse what compressed-tensors does not compute, or what no checkpoint has a scale for.

    Args:
        args: of an activation.
        static: the strategies whose scales calibration can give where ``args`` is.

    Raises:
        BitpressError: names the field and the values that work.
    """
    kind = QuantizationType(args.type)
    if kind == QuantizationType.FLOAT and (args.num_bits not in FLOAT_BITS or not args.symmetric):
        raise BitpressError(
            f"type float with num_bits {args.num_bits} and symmetric={args.symmetric} is not supported; floats have "
            "num_bits 4, 6 or 8 and symmetric=True."
        )
    if kind == QuantizationType.INT and not 2 <= args.num_bits <= 8:
        raise BitpressError(f"num_bits {args.num_bits} is not supported; integers have 2 to 8.")
    strategy = args.strategy
    if args.dynamic is False and strategy not in static:
        names = " or ".join(f'"{s.value}"' for s in static)
        raise BitpressError(
            f"dynamic=False with strategy {QuantizationStrategy(strategy).value!r} is not supported: a scale from "
            f"calibration is per {names}. Use one of these, or dynamic=True."
        )
    if args.dynamic is not True and args.observer not in MINMAX:
        raise BitpressError(
            f"observer {args.observer!r} is not supported: static ranges reach from the least to the greatest value of "
            "calibration. Leave it out, or use dynamic=True."
        )
    if args.dynamic is True and strategy == QuantizationStrategy.TENSOR_GROUP:
        raise BitpressError('dynamic=True with strategy "tensor_group" has no global scale: use dynamic="local".')
    if args.dynamic == DynamicType.LOCAL and static != OF_LAYERS:
        raise BitpressError('dynamic="local" is for the inputs of layers: use dynamic=False or True.')


def check_groups(args: QuantizationArgs | None, width: int) -> bool:
    """True if groups of the activation's columns fit its ``width``."""
    return args is None or args.strategy not in GROUPED or width % args.group_size == 0


def static_tensors(
    base: str, minimum: Tensor, maximum: Tensor, args: QuantizationArgs, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a checkpoint stores of an activation's grid, by the names that compressed-tensors reads.

    Args:
        base: "input", "output", "k", "v" or "q".
        minimum: float32, (1,), or (heads,) with a scale per head; its range is widened to hold 0.
        maximum: the same shape.
        args: static, or "local".
        dtype: the layer's, in which its scale is stored. A global scale is float32.

    Returns:
        ``{base}_scale`` and, of an asymmetric grid, ``{base}_zero_point``: (1,), or (heads, 1, 1); of "local" groups
        ``{base}_global_scale``, (1,), alone.
    """
    if args.dynamic == DynamicType.LOCAL:
        return {f"{base}_global_scale": generate_gparam(minimum.amin(), maximum.amax())}
    if args.strategy == QuantizationStrategy.ATTN_HEAD:
        minimum, maximum = minimum.view(-1, 1, 1), maximum.view(-1, 1, 1)
    if not args.symmetric:
        scale, zero_point = affine_parameters(minimum, maximum, args, dtype)
        return {f"{base}_scale": scale, f"{base}_zero_point": zero_point}
    scale = calculate_qparams(minimum, maximum, args)[0].to(dtype)
    # Too small for the stored dtype: any scale will do.
    return {f"{base}_scale": scale.masked_fill(scale == 0, torch.finfo(dtype).eps)}
