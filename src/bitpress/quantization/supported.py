"""Which weight grids there are."""

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)

from bitpress.errors import BitpressError
from bitpress.quantization.scales import ScaleKind, scale_kind

INTEGER_STRATEGIES = (QuantizationStrategy.TENSOR, QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)
FLOAT_STRATEGIES = (*INTEGER_STRATEGIES, QuantizationStrategy.BLOCK)
# Floats of 4 and 6 bits are stored with scales of their own kinds only.
SMALL_FLOATS = {
    4: "groups of 16 with scale_dtype float8_e4m3fn and strategy tensor_group (the preset NVFP4A16), or groups of 32 "
    "with scale_dtype uint8 (MXFP4A16)",
    6: "groups of 32 with scale_dtype uint8 (the preset MXFP6A16)",
}


def check_supported(args: QuantizationArgs) -> None:
    """Refuse weight grids that no format of compressed-tensors stores, or that bitpress cannot search.

    Integers have 2 to 8 bits, per tensor, channel or group. Floats are symmetric: 8 bits (e4m3) per tensor, channel,
    group or block, and the microscaling formats NVFP4, MXFP4, MXFP6 and MXFP8.

    Args:
        args: of a weight.

    Raises:
        BitpressError: names the field and the values that work.
    """
    integers = args.type == QuantizationType.INT
    if not (2 <= args.num_bits <= 8 if integers else args.num_bits in (4, 6, 8)):
        kind = QuantizationType(args.type).value
        raise BitpressError(
            f"weights: type {kind} with num_bits {args.num_bits} is not supported; use type int with num_bits 2 to 8, "
            "or type float with 4, 6 or 8."
        )
    if not integers:
        _check_float(args)
    elif args.strategy not in INTEGER_STRATEGIES:
        raise BitpressError(_of_strategies(args, INTEGER_STRATEGIES))
    if args.dynamic:
        raise BitpressError("weights: dynamic=True is for activations; weights have dynamic=False.")
    if args.actorder in (ActivationOrdering.GROUP, ActivationOrdering.DYNAMIC):
        raise BitpressError(f'weights: actorder {args.actorder.value!r} is not supported; use "static".')


def _check_float(args: QuantizationArgs) -> None:
    if not args.symmetric:
        raise BitpressError("weights: type float with symmetric=False is not supported; floats have a sign: use True.")
    if args.num_bits == 6 and not hasattr(CompressionFormat, "mxfp6_pack_quantized"):
        raise BitpressError("weights: floats of 6 bits need a later version of compressed-tensors (0.20 has them).")
    kind = scale_kind(args)
    if args.num_bits == 8:
        if kind == ScaleKind.POWER:
            return
        if args.strategy not in FLOAT_STRATEGIES:
            raise BitpressError(_of_strategies(args, FLOAT_STRATEGIES))
        if args.scale_dtype is not None and not args.scale_dtype.is_floating_point:
            raise BitpressError("weights: scale_dtype uint8 is for groups of 32 (MXFP8); leave it out.")
    elif kind == ScaleKind.PLAIN:
        raise BitpressError(f"weights: floats of {args.num_bits} bits are stored in {SMALL_FLOATS[args.num_bits]}.")


def _of_strategies(args: QuantizationArgs, known: tuple[QuantizationStrategy, ...]) -> str:
    names = ", ".join(s.value for s in known)
    return f"weights: strategy {args.strategy} is not supported; use one of {names}."
