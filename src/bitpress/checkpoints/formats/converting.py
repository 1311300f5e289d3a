"""One checkpoint made into another of a different format, tensor by tensor; no weight is quantized again."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints.card import renew_card
from bitpress.checkpoints.directory import CONFIG_FILE, check_destination, whole_directory
from bitpress.checkpoints.formats import gguf
from bitpress.checkpoints.formats.layer import Layer
from bitpress.checkpoints.formats.opening import COMPRESSED, FOREIGN, Checkpoint
from bitpress.checkpoints.formats.targets import Target, check_layers
from bitpress.checkpoints.layout import MAX_SHARD_SIZE, Layout, ShardWriter
from bitpress.checkpoints.unknown import WEIGHTS
from bitpress.errors import BitpressError
from bitpress.models.experts import find_layer
from bitpress.models.linears import weight_matrix
from bitpress.quantization import QuantizationScheme, QuantizedWeight

GGUF = "gguf"
FORMATS = (COMPRESSED, *FOREIGN, GGUF)


def check_format(kind: str) -> None:
    """Refuse a format that is not known.

    Raises:
        BitpressError: names those that are.
    """
    if kind not in FORMATS:
        raise BitpressError(f"format {kind!r} is not known: use one of {', '.join(FORMATS)}.")


def check_fits(kind: str, model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> None:
    """Refuse a format before anything is computed, as far as can be known.

    Args:
        kind: the format.
        model: the model.
        schemes: of the layers that will be quantized, by their names.

    Raises:
        BitpressError: see :func:`convert`.
    """
    if kind == GGUF:
        config: Any = getattr(model, "config", None)
        gguf.architecture_of({} if config is None else config.to_dict())
    layers = {name: weight_matrix(find_layer(model, name)) for name in schemes}
    check_layers(kind, [Layer(n, (w.shape[0], w.shape[1]), schemes[n]) for n, w in layers.items()])


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: str,  # noqa: A002
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a compressed checkpoint in another format.

    Points, scales and zero points stay what they are: nothing is quantized again. A layer at a time is in memory.

    Args:
        source: directory of a compressed-tensors, AWQ (GEMM) or GPTQ checkpoint.
        destination: directory to write to; it appears only when all is written.
        format: "compressed-tensors", "awq", "gptq" or "gguf".
        overwrite: replace a model that is in ``destination``.
        max_shard_size: of a safetensors file, in bytes or as "5GB".

    Returns:
        The directory.

    Raises:
        BitpressError: a layer does not fit the format (names the layer, its scheme and the way out), the source cannot
            be read, or the destination not be written to; nothing has been written.
    """
    check_format(format)
    checkpoint = Checkpoint.of(source)
    if checkpoint.format == format:
        raise BitpressError(f"{source} is of the format {format} already.")
    if format == GGUF:
        return gguf.write(checkpoint, destination, overwrite=overwrite)
    target = Target.of(format, checkpoint)
    layout = _layout(checkpoint, target, max_shard_size)
    path = check_destination(destination, overwrite=overwrite, needed=layout.nbytes)
    with whole_directory(path) as draft:
        with ShardWriter(draft, layout) as writer:
            for name in checkpoint.dense:
                writer.write(name, checkpoint.shards.read(name))
            for layer in checkpoint.layers.values():
                for name, tensor in _tensors(target, layer, checkpoint.read(layer)).items():
                    writer.write(name, tensor)
        config = {**checkpoint.config, "quantization_config": target.config}
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _copy_companions(checkpoint.shards.directory, draft)
        renew_card(draft)
    target.rounding.warn()
    return path


def _tensors(target: Target, layer: Layer, weight: QuantizedWeight) -> dict[str, Tensor]:
    rounded = replace(weight, scale=target.rounding(layer.name, weight.scale))
    return {f"{layer.name}.{kind}": tensor for kind, tensor in target.tensors(layer, rounded).items()}


def _layout(checkpoint: Checkpoint, target: Target, max_shard_size: int | str) -> Layout:
    """Where every tensor goes; of layers of one shape and scheme one is made of zeros, to know its tensors' shapes."""
    moulds: dict[str, Mapping[str, Tensor]] = {}
    tensors = {name: checkpoint.shards[name].meta() for name in checkpoint.dense}
    for layer in checkpoint.layers.values():
        kind = f"{layer.shape} {layer.scheme.model_dump_json()}"
        if kind not in moulds:
            moulds[kind] = {k: t.to("meta") for k, t in target.tensors(layer, _zeros(layer, target)).items()}
        tensors |= {f"{layer.name}.{each}": tensor for each, tensor in moulds[kind].items()}
    # In the order of the source's files, as far as that goes.
    order = {name.rpartition(".")[0]: position for position, name in enumerate(checkpoint.shards)}
    names = sorted(tensors, key=lambda name: order.get(name.rpartition(".")[0], len(order)))
    return Layout.of({name: tensors[name] for name in names}, max_shard_size=max_shard_size)


def _zeros(layer: Layer, target: Target) -> QuantizedWeight:
    grid = (layer.shape[0], layer.groups) if layer.args.strategy != "tensor" else (1,)
    scale = torch.ones(grid, dtype=target.rounding.dtype)
    return QuantizedWeight(torch.zeros(layer.shape, dtype=torch.int8), scale, scale.to(torch.int8), layer.args)


def _copy_companions(source: Path, draft: Path) -> None:
    """What is beside the weights: tokenizer, recipe, report, code."""
    for file in source.iterdir():
        weights: Any = file.name.endswith(WEIGHTS)
        if file.is_file() and not weights and not file.name.startswith(".") and not (draft / file.name).exists():
            shutil.copyfile(file, draft / file.name)
