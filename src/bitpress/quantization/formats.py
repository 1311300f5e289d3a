"""The format in which a scheme's weights are stored, by compressed-tensors' names."""

from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationType
from torch import nn

from bitpress.errors import BitpressError

PACKED = CompressionFormat.pack_quantized.value
# One value a byte, integers or 8-bit floats, as ``weight``.
LOOSE = tuple(f.value for f in (
    CompressionFormat.int_quantized, CompressionFormat.float_quantized, CompressionFormat.naive_quantized,
))  # fmt: skip


def stored_format(scheme: QuantizationScheme) -> str:
    """The format that ``scheme`` states, or else the one that compressed-tensors infers.

    With one exception: 4-bit integers beside 8-bit float activations (W4AFP8) are packed, as vLLM's kernel for them
    wants; compressed-tensors would give each a byte, and reads either.

    Raises:
        BitpressError: the weights cannot be stored in the format that is stated.
    """
    inferred: str = infer_module_format(nn.Linear, scheme).value
    weights, inputs = scheme.weights, scheme.input_activations
    integers = weights is not None and weights.type == QuantizationType.INT
    if integers and weights.num_bits == 4 and inputs is not None and inputs.type == QuantizationType.FLOAT:
        inferred = PACKED
    if scheme.format is None:
        return inferred
    stated: str = CompressionFormat(scheme.format).value
    alike = {PACKED, *LOOSE} - {"float-quantized"} if integers else {"float-quantized", "naive-quantized"}
    if stated != inferred and not (stated in alike and inferred in alike):
        raise BitpressError(f"format {stated!r} cannot store these weights: leave it out, or use {inferred!r}.")
    return stated


def weight_only_format(args: QuantizationArgs) -> str:
    """The format of weights of which nothing else is known."""
    return stored_format(QuantizationScheme(targets=[], weights=args))
