"""What a quantized layer carries: its scheme, scale and zero point. Its weight holds the grid's values.

The grid's points are not kept: a weight on its grid gives them back exactly, and a weight that has been changed since
does not pass for quantized.
"""

import torch
from compressed_tensors.quantization import QuantizationStatus
from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.experts import named_layers
from bitpress.models.linears import weight_matrix
from bitpress.quantization import PackedWeight, QuantizationScheme, QuantizedWeight


def attach(module: nn.Module, scheme: QuantizationScheme, weight: PackedWeight) -> None:
    """Mark a layer as quantized; its weight already holds the dequantized values."""
    device = weight_matrix(module).device
    module.quantization_scheme = scheme
    module.quantization_status = QuantizationStatus.FROZEN
    # As in a model that transformers loads: torch may choose another product for weights with gradients.
    module.weight.requires_grad_(False)
    module.register_buffer("weight_scale", weight.scale.to(device), persistent=False)
    module.register_buffer("weight_zero_point", weight.zero_point.to(device), persistent=False)
    if weight.global_scale is not None:
        module.register_buffer("weight_global_scale", weight.global_scale.to(device), persistent=False)


def scheme_of(module: nn.Module) -> QuantizationScheme:
    """The scheme that a quantized layer carries."""
    scheme: QuantizationScheme = module.quantization_scheme
    return scheme


def attached_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers by name."""
    return {name: m for name, m in named_layers(model) if getattr(m, "quantization_scheme", None) is not None}


def is_quantized(model: nn.Module) -> str | None:
    """Why a model counts as quantized already, or None."""
    layers = attached_layers(model)
    if layers:
        return f"{next(iter(layers))} has a quantization scheme"
    method = getattr(getattr(model, "config", None), "quantization_config", None)
    if method is not None:
        return "its config has a quantization_config"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("weight_packed", "qweight")) or (name.endswith("weight") and tensor.element_size() == 1):
            return f"{name} is a packed weight"
    return None


def packed_weight(name: str, module: nn.Module) -> PackedWeight:
    """The stored form of a quantized layer's weight.

    Raises:
        BitpressError: the weight is no longer on its grid: it was trained, cast or replaced since it was quantized.
    """
    scheme: QuantizationScheme = module.quantization_scheme
    matrix = weight_matrix(module)
    scale: torch.Tensor = module.weight_scale  # type: ignore[assignment]
    zero_point: torch.Tensor = module.weight_zero_point  # type: ignore[assignment]
    global_scale: torch.Tensor | None = getattr(module, "weight_global_scale", None)
    quantized = QuantizedWeight.on_grid(matrix, scale, zero_point, scheme.weights, global_scale)
    if scale.dtype != matrix.dtype or not torch.equal(quantized.dequantize(), matrix):
        raise BitpressError(
            f"{name}.weight is not what oneshot left there (trained, cast or replaced since). Save the model before "
            "changing it, or save dense weights with save_compressed=False."
        )
    return quantized.pack()
