"""Which layers a recipe can quantize: what does not fit is refused, what must stay as it is is left out."""

import logging
from typing import Any

import torch
from compressed_tensors.utils import is_match
from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.experts import find_layer, fused_experts, named_layers, routers
from bitpress.models.linears import has_columns, in_features, weight_matrix
from bitpress.models.smoothing import is_convolution
from bitpress.modifiers.activations import check_group
from bitpress.modifiers.observers import check_observer
from bitpress.quantization import QuantizationScheme, check_supported, stored_format
from bitpress.quantization.grid import GROUPED, block_shape

logger = logging.getLogger(__name__)

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Parameters that are left alone are spoken of from this share of the model on.
NOTABLE = 0.01


def check_scheme(label: str, scheme: QuantizationScheme) -> None:
    """Refuse a scheme that cannot be computed or stored.

    Raises:
        BitpressError: names the config group, the field, and what works.
    """
    if scheme.weights is None:
        raise BitpressError(f"config group {label!r} has no weights: weight quantization needs weights=.")
    check_group(label, scheme)
    try:
        check_supported(scheme.weights)
        check_observer(scheme.weights)
        stored_format(scheme)
    except BitpressError as error:
        raise BitpressError(f"config group {label!r}: {error}") from error


def check_shapes(model: nn.Module, schemes: dict[str, QuantizationScheme]) -> None:
    """Every problem at once: group sizes that do not divide, dtypes that cannot hold a scale."""
    problems: dict[tuple[int, int], list[str]] = {}
    ragged: dict[tuple[int, int], list[str]] = {}
    for name, scheme in schemes.items():
        layer = find_layer(model, name)
        dtype = weight_matrix(layer).dtype
        if dtype not in STORED_DTYPES:
            raise BitpressError(f"{name}.weight is {dtype}: load the model in float32, float16 or bfloat16.")
        args = scheme.weights
        if args.strategy in GROUPED and in_features(layer) % args.group_size:
            problems.setdefault((args.group_size, in_features(layer)), []).append(name)
        block = block_shape(args)
        if block is not None and in_features(layer) % block[1]:
            ragged.setdefault((block[1], in_features(layer)), []).append(name)
    if not problems:
        for (columns, width), names in ragged.items():
            logger.warning(
                "blocks of %d columns do not divide the %d inputs of %s: transformers reads them, but vLLM's kernels "
                "want whole blocks. Add the layers to ignore if it is to serve them.", columns, width, _some(names),
            )  # fmt: skip
        return
    lines = []
    for (group, width), names in problems.items():
        fits = ", ".join(str(d) for d in (256, 128, 96, 64, 48, 32, 16, 8) if width % d == 0) or "none of the usual"
        lines.append(
            f"group_size {group} does not divide the {width} inputs of {_some(names)} (sizes that fit: {fits})"
        )
    raise BitpressError("; ".join(lines) + ". Choose a size that fits, or add the layers to ignore.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def drop_routers(model: nn.Module, schemes: dict[str, QuantizationScheme]) -> None:
    """Routers of experts are left alone, as servers expect, unless a target names them."""
    for name in routers(model):
        if name in schemes and not any(is_match(name, _NAMELESS, target) for target in schemes[name].targets):
            logger.info("%s decides about experts and is left alone: name it in targets to quantize it.", name)
            del schemes[name]


_NAMELESS = nn.Module()  # matches by its name only


def drop_shared_weights(model: nn.Module, schemes: dict[str, QuantizationScheme]) -> None:
    """A weight that another module uses too (a tied head) is left alone: to quantize it would change both."""
    users: dict[int, list[str]] = {}
    for name, module in named_layers(model):
        for parameter in module.parameters(recurse=False):
            users.setdefault(_place(parameter), []).append(name)
    for name in list(schemes):
        others = [n for n in users[_place(find_layer(model, name).weight)] if n != name]
        if others:
            logger.warning(
                "%s shares its weight with %s and is left alone: untie them if it is to be quantized.",
                name,
                ", ".join(others),
            )
            del schemes[name]


def _place(parameter: Any) -> Any:
    """Equal for parameters that are one, and for those that only share their memory."""
    if parameter.is_meta:
        return parameter.untyped_storage()._cdata, parameter.storage_offset(), parameter.shape
    return (parameter.data_ptr(), parameter.shape) if parameter.data_ptr() else id(parameter)


def say_what_is_no_layer(model: nn.Module) -> None:
    """Weights that no layer holds are left alone: an in-projection of ``nn.MultiheadAttention``, for instance."""
    total = sum(p.numel() for p in model.parameters())
    found: dict[tuple[str, str], list[nn.Parameter]] = {}
    for module in model.modules():
        experts = fused_experts(module)
        known = has_columns(module) or is_convolution(module) or isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for local, parameter in () if known else module._parameters.items():
            fused = experts is not None and local in experts.parameters
            if parameter is not None and parameter.dim() > 1 and not fused:
                found.setdefault((type(module).__name__, local), []).append(parameter)
    for (kind, local), parameters in found.items():
        share = sum(p.numel() for p in parameters) / total
        if share >= NOTABLE:
            logger.warning(
                "%s of %d %s (%.0f%% of all parameters) is left alone: a parameter, not a linear layer. Hold it in "
                "an nn.Linear if it is to be quantized.",
                local, len(parameters), kind, 100 * share,
            )  # fmt: skip
