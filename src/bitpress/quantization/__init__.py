"""Numbers and grids: schemes, quantization to a grid and back, packing.

The classes that describe a scheme are those of the ``compressed-tensors`` library, so that its users
(transformers, vLLM, SGLang) understand every checkpoint.
"""

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    is_preset_scheme,
    preset_name_to_scheme,
)

from bitpress.quantization.activations import (
    check_activations,
    is_static,
    quantizes_activations,
    static_tensors,
)
from bitpress.quantization.formats import stored_format
from bitpress.quantization.grid import (
    affine_parameters,
    check_supported,
    dequantize,
    fake_quantize,
    integer_range,
    quantize,
)
from bitpress.quantization.weights import PackedWeight, QuantizedWeight

__all__ = [
    "PackedWeight",
    "QuantizationArgs",
    "QuantizationScheme",
    "QuantizationStrategy",
    "QuantizationType",
    "QuantizedWeight",
    "affine_parameters",
    "check_activations",
    "check_supported",
    "dequantize",
    "fake_quantize",
    "integer_range",
    "is_preset_scheme",
    "is_static",
    "preset_name_to_scheme",
    "quantize",
    "quantizes_activations",
    "static_tensors",
    "stored_format",
]
