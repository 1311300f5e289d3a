"""Reading a compressed checkpoint back."""

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from bitpress.checkpoints.attached import attach
from bitpress.checkpoints.directory import read_config
from bitpress.checkpoints.keeping import Keep, stand_in
from bitpress.checkpoints.packed import (
    is_stored_quantized,
    read_weights,
    scheme_for,
    take_packed,
    targets_of,
    write_expert,
)
from bitpress.checkpoints.pretrained import load_compressed, load_pretrained
from bitpress.checkpoints.states import take_activations, take_attentions
from bitpress.errors import BitpressError
from bitpress.models.experts import ExpertLinear, find_layer, named_layers
from bitpress.models.linears import as_parameter, is_linear, weight_matrix
from bitpress.quantization import PackedWeight, QuantizationScheme


def load(
    directory: str | os.PathLike[str], model: nn.Module | None = None, *, keep: Keep | None = None, **options: Any
) -> nn.Module:
    """Load what :func:`bitpress.save` wrote.

    Args:
        directory: of the checkpoint.
        model: a module of the architecture that was saved; it is filled and returned. Not needed for a transformers
            causal language model.
        keep: takes weights packed; by default none.
        **options: of ``from_pretrained``, where there is no ``model``.

    Returns:
        The model with dense weights that equal, bit for bit, those that were saved, but for those kept packed.

    Raises:
        BitpressError: a file is missing or cannot be read, or it does not fit the model; the model is left as it was.
    """
    path = Path(directory).expanduser()
    config = read_config(path)
    if model is None:
        return _load_transformers(path, config, options, keep)
    stored = read_weights(path)
    attentions = take_attentions(stored, config, model)
    dense, packed, schemes, kept = _unpack(stored, config, model, keep)
    activations = {name: take_activations(dense, name) for name in packed}
    _fill_tied(dense, config, model)
    _check_fit(dense, model, path)
    # A model on the meta device has no memory to copy to.
    model.load_state_dict(dense, assign=any(p.is_meta for p in model.parameters()))
    for name, weight in packed.items():
        attach(find_layer(model, name), schemes[name], weight, activations[name])
    for name, attention in attentions.items():
        attention.attach_to(model, name)
    if keep is not None:
        keep.put(model, kept)
    return model


def _load_transformers(path: Path, config: dict[str, Any], options: dict[str, Any], keep: Keep | None) -> nn.Module:
    if "model_type" not in config:
        raise BitpressError(f"{path} is not of a transformers model: give bitpress.load a model of its architecture.")
    try:
        return load_compressed(path, config, options, keep) or load_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise BitpressError(f"transformers cannot load {path}: {error}") from error


def _unpack(
    stored: dict[str, Tensor], config: dict[str, Any], model: nn.Module, keep: Keep | None
) -> tuple[dict[str, Tensor], dict[str, PackedWeight], dict[str, QuantizationScheme], dict[str, PackedWeight]]:
    """Dense tensors by name, with the packed layers, their schemes, and those of them that are kept packed."""
    dense = dict(stored)
    packed: dict[str, PackedWeight] = {}
    schemes: dict[str, QuantizationScheme] = {}
    schemes_by_target = targets_of(config)
    quantized = {n: m for n, m in named_layers(model) if is_linear(m) and is_stored_quantized(stored, n)}
    kept = set() if keep is None else set(keep.which(model, quantized))
    for name, module in quantized.items():
        schemes[name] = scheme_for(name, module, schemes_by_target)
        dtype = weight_matrix(module).dtype
        packed[name] = take_packed(dense, name, schemes[name], dtype)
        weight = stand_in(packed[name], dtype) if name in kept else packed[name].unpack().dequantize()
        if isinstance(module, ExpertLinear):
            write_expert(dense, name, module, weight)
        else:
            dense[f"{name}.weight"] = as_parameter(module, weight)
    return dense, packed, schemes, {name: packed[name] for name in quantized if name in kept}


def _fill_tied(dense: dict[str, Tensor], config: dict[str, Any], model: nn.Module) -> None:
    """Weights that are stored under another name: as the checkpoint says, or as the model shares them itself."""
    for alias, name in config.get("tied_weights", {}).items():
        if name in dense:
            dense[alias] = dense[name]
    own = model.state_dict()
    stored = {tensor.data_ptr(): name for name, tensor in own.items() if name in dense}
    for name, tensor in own.items():
        if name not in dense and tensor.numel() and tensor.data_ptr() in stored:
            dense[name] = dense[stored[tensor.data_ptr()]]


def _check_fit(dense: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    wanted = model.state_dict()
    for what, names in (
        ("lacks", wanted.keys() - dense.keys()),
        ("has more than the model:", dense.keys() - wanted.keys()),
    ):
        if names:
            raise BitpressError(
                f"{path} does not fit {type(model).__name__}: it {what} {', '.join(sorted(names)[:3])}."
            )
    for name, tensor in dense.items():
        if tensor.shape != wanted[name].shape:
            raise BitpressError(
                f"{path} does not fit {type(model).__name__}: {name} is {tuple(tensor.shape)}, "
                f"the model's {tuple(wanted[name].shape)}."
            )
        if tensor.dtype != wanted[name].dtype:
            raise BitpressError(
                f"{path} does not fit {type(model).__name__}: {name} is {tensor.dtype}, the model's "
                f"{wanted[name].dtype}. Give a model of that dtype: model.to({tensor.dtype})."
            )
