"""Models that transformers builds: from a path or hub id, and from checkpoints that it cannot read itself."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpress.checkpoints.attached import attach
from bitpress.checkpoints.experts import checkpoint_names, stored_experts
from bitpress.checkpoints.packed import read_weights, scheme_for, take_packed, targets_of, write_expert
from bitpress.models.experts import ExpertLinear, find_layer, named_layers
from bitpress.models.linears import as_parameter, is_linear
from bitpress.quantization import PackedWeight, QuantizationScheme


def load_pretrained(source: str | os.PathLike[str], **options: Any) -> nn.Module:
    """The model of a path or hub id, of the class that its config names; a causal language model if it names none."""
    import transformers  # noqa: PLC0415

    trust = {k: v for k, v in options.items() if k in ("trust_remote_code", "revision", "token", "cache_dir")}
    config = transformers.AutoConfig.from_pretrained(os.fspath(source), **trust)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    loader: Any = named or transformers.AutoModelForCausalLM
    model: nn.Module = loader.from_pretrained(os.fspath(source), **options)
    return model


def load_unread_experts(path: Path, config: dict[str, Any], options: dict[str, Any]) -> nn.Module | None:
    """The model of a checkpoint whose experts are packed in a way that transformers cannot read; None of any other."""
    import transformers  # noqa: PLC0415

    by_target = targets_of(config)
    model_class: Any = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if not by_target or model_class is None:
        return None
    model_config = transformers.AutoConfig.from_pretrained(path)
    del model_config.quantization_config
    with torch.device("meta"):
        skeleton = model_class(model_config)
    experts = stored_experts(skeleton)
    names = {layer: stored for each in experts for layer, stored in each.names.items()}
    if not names:
        return None
    weights = read_weights(path)
    if not any(f"{stored}.weight_packed" in weights for stored in names.values()) or (
        all(each.by_transformers for each in experts) and all(s.weights.symmetric for s in by_target.values())
    ):
        return None
    linears = {name: layer for name, layer in named_layers(skeleton) if is_linear(layer)}
    names = checkpoint_names(skeleton, [name for name in linears if name not in names]) | names
    packed: dict[str, tuple[QuantizationScheme, PackedWeight]] = {}
    for name, layer in linears.items():
        if f"{names[name]}.weight_packed" not in weights:
            continue
        scheme = scheme_for(name, layer, by_target)
        packed[name] = scheme, take_packed(weights, names[name], scheme)
        dense = packed[name][1].unpack().dequantize()
        if isinstance(layer, ExpertLinear):
            write_expert(weights, name, layer, dense)
        else:
            weights[f"{names[name]}.weight"] = as_parameter(layer, dense)
    options = {"dtype": model_config.dtype, **options}
    model: Any = model_class.from_pretrained(None, config=model_config, state_dict=weights, **options)
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    for name, (scheme, weight) in packed.items():
        attach(find_layer(model, name), scheme, weight)
    loaded: nn.Module = model
    return loaded
