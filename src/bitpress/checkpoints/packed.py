"""The tensors of a compressed checkpoint: read from its files, and told apart by its config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_targets
from safetensors.torch import load_file
from torch import Tensor, nn

from bitpress.checkpoints.directory import CONFIG_FILE, WEIGHTS_FILE
from bitpress.errors import BitpressError
from bitpress.models.experts import ExpertLinear
from bitpress.quantization import PackedWeight, QuantizationScheme

KINDS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors files.

    Raises:
        BitpressError: there is none, or one cannot be read.
    """
    stored: dict[str, Tensor] = {}
    for file in sorted(path.glob(f"{Path(WEIGHTS_FILE).stem}-*-of-*.safetensors")) or [path / WEIGHTS_FILE]:
        if not file.is_file():
            raise BitpressError(f"{path} holds no checkpoint: {WEIGHTS_FILE} is missing.")
        try:
            stored |= load_file(file)
        except Exception as error:
            raise BitpressError(f"{file} cannot be read as safetensors: {error}") from error
    return stored


def targets_of(config: Mapping[str, Any]) -> dict[str, QuantizationScheme]:
    """The schemes of a checkpoint's config by what they target."""
    if "quantization_config" not in config:
        return {}
    groups = QuantizationConfig(**config["quantization_config"]).config_groups
    return {target: scheme for scheme in groups.values() for target in scheme.targets}


def scheme_for(name: str, module: nn.Module, by_target: Mapping[str, QuantizationScheme]) -> QuantizationScheme:
    """The scheme of a layer that is packed.

    Raises:
        BitpressError: the config has none for it.
    """
    matched = match_targets(name, module, by_target)
    if not matched:
        raise BitpressError(f"{name} is quantized, but no config group of {CONFIG_FILE} targets it.")
    return by_target[matched[0]]


def is_stored_quantized(stored: Mapping[str, Tensor], name: str) -> bool:
    """True if the layer that is stored as ``name`` is quantized: then its weight has scales, in every format."""
    return f"{name}.weight_scale" in stored


def take_packed(stored: dict[str, Tensor], name: str, scheme: QuantizationScheme, dtype: torch.dtype) -> PackedWeight:
    """The packed weight of the layer that is stored as ``name``; its tensors are taken out of ``stored``.

    ``dtype`` is what the layer's weight had, for scales that are stored in one of their own.
    """
    tensors = {kind: stored.pop(f"{name}.{kind}") for kind in KINDS if f"{name}.{kind}" in stored}
    return PackedWeight.from_tensors(tensors, scheme.weights, dtype)


def write_expert(dense: dict[str, Tensor], name: str, layer: ExpertLinear, weight: Tensor) -> None:
    """Put an expert's weight, (out, in), in its place in ``dense``: in the parameter of all experts."""
    owner = name.removesuffix(layer.local)  # with its dot
    whole = f"{owner}{layer.projection.parameter}"
    if whole not in dense:
        dense[whole] = torch.zeros(
            layer.experts.module.get_parameter(layer.projection.parameter).shape, dtype=weight.dtype
        )
    layer.projection.within(dense[whole][layer.expert]).copy_(weight)
