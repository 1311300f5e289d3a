"""Models that transformers builds: from a path or hub id, and from checkpoints that it cannot read itself."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints.attached import attach
from bitpress.checkpoints.experts import checkpoint_names, stored_experts
from bitpress.checkpoints.keeping import Keep, stand_in
from bitpress.checkpoints.packed import (
    is_stored_quantized,
    read_weights,
    scheme_for,
    take_packed,
    targets_of,
    write_expert,
)
from bitpress.checkpoints.states import take_activations, take_attentions
from bitpress.errors import BitpressError, nearest_file
from bitpress.models.experts import ExpertLinear, find_layer, named_layers
from bitpress.models.linears import as_parameter, is_linear
from bitpress.quantization import PackedWeight, QuantizationScheme


def load_pretrained(source: str | os.PathLike[str], **options: Any) -> nn.Module:
    """The model of a path or hub id, of the class that its config names; a causal language model if it names none."""
    import transformers  # noqa: PLC0415

    place, file = split_gguf(source)
    options |= file
    known = ("trust_remote_code", "revision", "token", "cache_dir", *file)
    config = transformers.AutoConfig.from_pretrained(place, **{k: v for k, v in options.items() if k in known})
    named = getattr(transformers, (config.architectures or [""])[0], None)
    loader: Any = named or transformers.AutoModelForCausalLM
    model: Any = loader.from_pretrained(place, **options)
    if file:
        _forget_quantization(model)
    loaded: nn.Module = model
    return loaded


def split_gguf(source: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """How transformers is asked for what a path or hub id names: of a GGUF file its directory, and its name."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return os.fspath(source), {}


def _forget_quantization(model: Any) -> None:
    """Of a model that transformers has read from a GGUF file: it says that it is quantized, and is not any more."""
    model.config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.is_quantized = False


def load_named(source: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model that a user names.

    Raises:
        BitpressError: it is no name, or nothing can be loaded by it.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise BitpressError(f"a {type(source).__name__} is no model: give a module, a path or a hub id.")
    try:
        return load_pretrained(source, dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True)
    except (OSError, ValueError) as error:
        near = "" if Path(source).expanduser().exists() else nearest_file(Path(source))
        raise BitpressError(f"the model {str(source)!r} cannot be loaded{near}: {error}") from error


def load_compressed(
    path: Path, config: dict[str, Any], options: dict[str, Any], keep: Keep | None = None
) -> nn.Module | None:
    """The model of a compressed checkpoint, with its layers marked as quantized; their weights are dense, or kept.

    It does not depend on what transformers reads: experts with zero points, or models that it cannot initialize without
    weights. None if the checkpoint is not compressed, or transformers has no class for it.
    """
    import transformers  # noqa: PLC0415

    by_target = targets_of(config)
    model_class: Any = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if not by_target or model_class is None:
        return None
    model_config = transformers.AutoConfig.from_pretrained(path)
    del model_config.quantization_config
    with torch.device("meta"):
        skeleton = model_class(model_config)
    names = stored_names(skeleton)
    weights = read_weights(path)
    attentions = take_attentions(weights, config, skeleton)
    packed: dict[str, tuple[QuantizationScheme, PackedWeight, dict[str, Tensor]]] = {}
    quantized = [name for name, stored in names.items() if is_stored_quantized(weights, stored)]
    kept = set() if keep is None else set(keep.which(skeleton, quantized))
    options = {"dtype": model_config.dtype, **options}
    dtype = options["dtype"] if isinstance(options["dtype"], torch.dtype) else model_config.dtype
    for name, stored in names.items():
        layer = find_layer(skeleton, name)
        if not is_stored_quantized(weights, stored):
            if isinstance(layer, ExpertLinear) and f"{stored}.weight" in weights:
                write_expert(weights, name, layer, weights.pop(f"{stored}.weight"))
            continue
        scheme = scheme_for(name, layer, by_target)
        weight = take_packed(weights, stored, scheme, model_config.dtype)
        packed[name] = scheme, weight, take_activations(weights, stored)
        dense = stand_in(weight, dtype) if name in kept else weight.unpack().dequantize()
        if isinstance(layer, ExpertLinear):
            write_expert(weights, name, layer, dense)
        else:
            weights[f"{stored}.weight"] = as_parameter(layer, dense)
    model: Any = model_class.from_pretrained(None, config=model_config, state_dict=weights, **options)
    model.__dict__.pop("_weight_conversions", None)  # those of the dense weights here, not of the checkpoint
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    for name, (scheme, weight, activations) in packed.items():
        attach(find_layer(model, name), scheme, weight, activations)
    for name, attention in attentions.items():
        attention.attach_to(model, name)
    if keep is not None:
        keep.put(model, {name: weight for name, (_, weight, _) in packed.items() if name in kept})
    loaded: nn.Module = model
    return loaded


def stored_names(model: nn.Module) -> dict[str, str]:
    """What each linear layer is called in a checkpoint, by its name in the model."""
    of_experts = {layer: stored for each in stored_experts(model) for layer, stored in each.names.items()}
    others = [name for name, layer in named_layers(model) if is_linear(layer) and name not in of_experts]
    return checkpoint_names(model, others) | of_experts
