"""What a quantized layer carries: its scheme, scales and zero points. Its weight holds the grid's values.

The grid's points are not kept: a weight on its grid gives them back exactly, and a weight that has been changed since
does not pass for quantized. Activations are quantized by compressed-tensors' own functions, which layers and attentions
are given here as its loader gives them: the model in memory computes what the loaded checkpoint does.
"""

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.modeling import IMPL_ATTR
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import set_forward_quantized
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.experts import ExpertLinear, named_layers
from bitpress.models.linears import weight_matrix
from bitpress.models.taps import hook_attention
from bitpress.quantization import PackedWeight, QuantizationScheme, QuantizedWeight, quantizes_activations

# What a checkpoint holds of static activations, by the names behind the layer's or the attention's.
ACTIVATIONS = tuple(
    f"{base}_{kind}" for base in ("input", "output") for kind in ("scale", "zero_point", "global_scale")
)
STATES = tuple(f"{base}_{kind}" for base in ("q", "k", "v") for kind in ("scale", "zero_point"))


def attach(
    module: nn.Module, scheme: QuantizationScheme, weight: PackedWeight, activations: Mapping[str, Tensor] | None = None
) -> None:
    """Mark a layer as quantized; its weight already holds the dequantized values.

    Args:
        module: the layer. Its forward quantizes activations from here on, if the scheme says so; that of fused experts
            does not, in transformers neither.
        scheme: the scheme.
        weight: what its weight holds.
        activations: the tensors of static activations.
    """
    device = weight_matrix(module).device
    module.quantization_scheme = scheme
    # Not frozen: compressed-tensors would quantize the weight again in every forward.
    module.quantization_status = QuantizationStatus.DECOMPRESSED
    # As in a model that transformers loads: torch may choose another product for weights with gradients.
    module.weight.requires_grad_(False)
    module.register_buffer("weight_scale", weight.scale.to(device), persistent=False)
    module.register_buffer("weight_zero_point", weight.zero_point.to(device), persistent=False)
    if weight.global_scale is not None:
        module.register_buffer("weight_global_scale", weight.global_scale.to(device), persistent=False)
    register_activations(module, activations or {}, weight_matrix(module))
    if quantizes_activations(scheme) and not isinstance(module, ExpertLinear):
        set_forward_quantized(module)


def attach_attention(
    model: nn.Module, name: str, scheme: QuantizationScheme, states: Mapping[str, Tensor], *, queries: bool
) -> None:
    """Make an attention of ``model`` quantize its keys and values as they are cached, and its ``queries`` too."""
    attention = model.get_submodule(name)
    hook_attention(model, attention, queries=queries)
    attention.quantization_scheme = scheme
    attention.quantization_status = QuantizationStatus.DECOMPRESSED
    register_activations(attention, states, next(attention.parameters()))


def register_activations(module: nn.Module, tensors: Mapping[str, Tensor], like: Tensor) -> None:
    """Give a layer or attention the tensors of its static activations.

    Scales have the dtype of the weights, in whichever the model was loaded; only global ones are always float32.
    """
    for kind, tensor in tensors.items():
        scale = kind.endswith("_scale") and not kind.endswith("_global_scale")
        module.register_buffer(kind, tensor.to(like.device, like.dtype if scale else tensor.dtype), persistent=False)


def static_activations(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of the static activations of a layer or an attention."""
    found = {kind: getattr(module, kind, None) for kind in (*ACTIVATIONS, *STATES)}
    return {kind: tensor for kind, tensor in found.items() if tensor is not None}


def scheme_of(module: nn.Module) -> QuantizationScheme:
    """The scheme that a quantized layer carries."""
    scheme: QuantizationScheme = module.quantization_scheme
    return scheme


def attached_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers by name."""
    return {name: m for name, m in _marked(model).items() if scheme_of(m).weights is not None}


def attached_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions whose states are quantized, by name."""
    return {name: m for name, m in _marked(model).items() if scheme_of(m).weights is None}


def quantizes_queries(attention: nn.Module) -> bool:
    """True if an attention is quantized itself, not only its cache."""
    return hasattr(attention, IMPL_ATTR)


def _marked(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in named_layers(model) if getattr(m, "quantization_scheme", None) is not None}


def is_quantized(model: nn.Module) -> str | None:
    """Why a model counts as quantized already, or None."""
    marked = _marked(model)
    if marked:
        return f"{next(iter(marked))} has a quantization scheme"
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
    if holds_packed(module):
        return _own_weight(name, module)
    scheme: QuantizationScheme = module.quantization_scheme
    matrix = weight_matrix(module)
    scale: torch.Tensor = module.weight_scale  # type: ignore[assignment]
    zero_point: torch.Tensor = module.weight_zero_point  # type: ignore[assignment]
    global_scale: torch.Tensor | None = getattr(module, "weight_global_scale", None)
    quantized = QuantizedWeight.on_grid(matrix, scale, zero_point, scheme.weights, global_scale)
    if scale.dtype != matrix.dtype or not torch.equal(quantized.dequantize(), matrix):
        raise _changed(name)
    return quantized.pack()


def holds_packed(module: nn.Module) -> bool:
    """True for a layer whose weight is packed in memory: one of :mod:`bitpress.runtime`."""
    return "weight" not in module._parameters and hasattr(module, "packed_weight")


def _own_weight(name: str, module: Any) -> PackedWeight:
    weight: PackedWeight = module.packed_weight()
    if weight.scale.dtype != module.weight_dtype:
        raise _changed(name)
    return weight


def _changed(name: str) -> BitpressError:
    return BitpressError(
        f"{name}.weight is not what oneshot left there (trained, cast or replaced since). Save the model before "
        "changing it, or save dense weights with save_compressed=False."
    )
