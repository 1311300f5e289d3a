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
    dequantize,
    fake_quantize,
    integer_range,
    limits,
    points_dtype,
    quantize,
    round_to_points,
)
from bitpress.quantization.scales import (
    affine_parameters,
    has_global_scale,
    shared_global_scale,
    step_sizes,
)
from bitpress.quantization.supported import check_supported
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
    "has_global_scale",
    "integer_range",
    "is_preset_scheme",
    "is_static",
    "limits",
    "points_dtype",
    "preset_name_to_scheme",
    "quantize",
    "quantizes_activations",
    "round_to_points",
    "shared_global_scale",
    "static_tensors",
    "step_sizes",
    "stored_format",
]
