"""A compressed checkpoint on the disk, whatever its format: its layers, and the weight of each when asked for."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints.directory import read_config
from bitpress.checkpoints.formats import awq, gptq
from bitpress.checkpoints.formats.layer import Layer
from bitpress.checkpoints.formats.structure import Structure
from bitpress.checkpoints.packed import KINDS, scheme_for, targets_of
from bitpress.checkpoints.shards import Shards
from bitpress.errors import BitpressError
from bitpress.quantization import (
    PackedWeight,
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    QuantizedWeight,
)
from bitpress.quantization.weights import read_grid

COMPRESSED = "compressed-tensors"
FOREIGN: Mapping[str, ModuleType] = {"awq": awq, "gptq": gptq}


@dataclass(frozen=True)
class Checkpoint:
    """A compressed checkpoint.

    Attributes:
        format: "compressed-tensors", "awq" or "gptq".
        config: its config.json without what is said of quantization.
        stated: what is said of quantization.
        shards: its tensors.
        structure: the names of the model's layers.
        layers: the quantized ones, by what their tensors' names begin with.
        dense: names of all other tensors.
        zeros: the least and the greatest of all signed zero points.
    """

    format: str
    config: dict[str, Any]
    stated: dict[str, Any]
    shards: Shards
    structure: Structure
    layers: dict[str, Layer]
    dense: list[str]
    zeros: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> "Checkpoint":
        """Open it; of the tensors only the zero points are read.

        Raises:
            BitpressError: there is none, it is not compressed, or holds what is not read; says what.
        """
        path = Path(directory).expanduser()
        config = read_config(path)
        stated = config.pop("quantization_config", None)
        if not stated:
            raise BitpressError(f"{path} is not compressed: nothing to convert. `bitpress oneshot` compresses it.")
        kind = stated.get("quant_method", COMPRESSED)
        shards = Shards.of(path)
        if kind == COMPRESSED:
            opened = _compressed(path, config, stated, shards)
        elif kind in FOREIGN:
            opened = _foreign(kind, path, config, stated, shards)
        else:
            raise BitpressError(f"{path} is of the format {kind!r}; read are {COMPRESSED}, {' and '.join(FOREIGN)}.")
        if not opened.layers:
            raise BitpressError(f"{path} holds no quantized layer: nothing to convert.")
        return opened._with_zeros()

    @property
    def dtype(self) -> torch.dtype:
        """That of the model."""
        return self.structure.dtype

    def read(self, layer: Layer) -> QuantizedWeight:
        """A layer's weight."""
        if self.format == COMPRESSED:
            return PackedWeight.from_tensors(self._stored(layer, KINDS), layer.args, self.dtype).unpack()
        scale, zero_point = self._grid(layer)
        values = FOREIGN[self.format].points(layer, self._stored(layer, FOREIGN[self.format].POINTS))
        return QuantizedWeight(values, scale, zero_point, layer.args)

    def _grid(self, layer: Layer) -> tuple[Tensor, Tensor]:
        if self.format == COMPRESSED:
            stored = self._stored(layer, ("weight_scale", "weight_zero_point"))
            return read_grid(stored, layer.args, layer.shape[0], self.dtype)
        foreign: Any = FOREIGN[self.format]
        said = (self.stated.get("checkpoint_format", gptq.LESS_ONE),) if foreign is gptq else ()
        found_scale, zero_point = foreign.grid(layer, self._stored(layer, foreign.GRID), *said)
        return found_scale, zero_point

    def _stored(self, layer: Layer, kinds: Any) -> dict[str, Tensor]:
        names = {kind: f"{layer.name}.{kind}" for kind in kinds}
        return {kind: self.shards.read(name) for kind, name in names.items() if name in self.shards}

    def _with_zeros(self) -> "Checkpoint":
        """Foreign formats do not say which grids are symmetric: those of which all zero points are 0."""
        of_layers = [self._grid(layer)[1] for layer in self.layers.values() if not layer.args.symmetric]
        if not of_layers:
            return self
        ranges = [tuple(int(n) for n in each.aminmax()) for each in of_layers]
        zeros = min(least for least, _ in ranges), max(greatest for _, greatest in ranges)
        if self.format == COMPRESSED or zeros != (0, 0):
            return replace(self, zeros=zeros)
        return replace(self, layers={name: _symmetric(layer) for name, layer in self.layers.items()})


def _symmetric(layer: Layer) -> Layer:
    args = layer.args.model_copy(update={"symmetric": True})
    return replace(layer, scheme=layer.scheme.model_copy(update={"weights": args}))


def _compressed(path: Path, config: dict[str, Any], stated: dict[str, Any], shards: Shards) -> Checkpoint:
    for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if stated.get(key):
            raise BitpressError(f"{path} has a {key}, which no other format holds.")
    by_target = targets_of({"quantization_config": stated})
    shapes = dict(_shapes(shards))
    structure = Structure.of(path, shards, shapes)
    layers = {}
    for name, shape in shapes.items():
        scheme = scheme_for(structure.in_model.get(name, name), structure.module(name), by_target)
        if f"{name}.weight_g_idx" in shards:
            raise BitpressError(f"{name} is quantized with act-order (weight_g_idx), which is not converted.")
        layers[name] = Layer(name, shape, scheme)
    claimed = {f"{name}.{kind}" for name in layers for kind in KINDS}
    dense = [name for name in shards if name not in claimed]
    return Checkpoint(COMPRESSED, config, stated, shards, structure, layers, dense)


def _shapes(shards: Shards) -> Iterator[tuple[str, tuple[int, int]]]:
    for tensor in shards:
        name, _, kind = tensor.rpartition(".")
        if kind != "weight_scale":
            continue
        if f"{name}.weight_shape" in shards:
            rows, columns = (int(n) for n in shards.read(f"{name}.weight_shape"))
            yield name, (rows, columns)
        else:
            whole = f"{name}.weight"
            stored = shards[whole if whole in shards else f"{name}.weight_packed"]
            yield name, (stored.shape[0], stored.shape[-1])


def _foreign(kind: str, path: Path, config: dict[str, Any], stated: dict[str, Any], shards: Shards) -> Checkpoint:
    version = str(stated.get("version") or stated.get("checkpoint_format") or "").lower()
    known = ("gemm", "") if kind == "awq" else (gptq.LESS_ONE, gptq.AS_IT_IS, "")
    if version not in known:
        raise BitpressError(f"{path} is {kind} of the kind {version!r}; read are {' and '.join(filter(None, known))}.")
    foreign: Any = FOREIGN[kind]
    whole_rows = stated.get("group_size", -1) == -1
    kinds = (*foreign.POINTS, *foreign.GRID)
    shapes: dict[str, tuple[int, int]] = {}
    schemes = {}
    for name in (tensor.removesuffix(".qweight") for tensor in shards if tensor.endswith(".qweight")):
        missing = next((each for each in kinds if f"{name}.{each}" not in shards), None)
        if missing is not None:
            raise BitpressError(f"{path} lacks {name}.{missing}: it is no {kind} checkpoint, or not whole.")
        rows, columns, groups, bits = foreign.shape_of({each: shards[f"{name}.{each}"].shape for each in kinds})
        if columns % groups:
            raise BitpressError(f"{name} has {groups} groups of {columns} columns, which are not of one size.")
        shapes[name] = rows, columns
        schemes[name] = QuantizationScheme(
            targets=[nn.Linear.__name__], weights=_args(bits, columns // groups, whole=whole_rows and groups == 1)
        )
    layers = {name: Layer(name, shape, schemes[name]) for name, shape in shapes.items()}
    claimed = {f"{name}.{each}" for name in layers for each in kinds}
    dense = [name for name in shards if name not in claimed]
    return Checkpoint(kind, config, stated, shards, Structure.of(path, shards, shapes), layers, dense)


def _args(bits: int, group: int, *, whole: bool) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        symmetric=False,
        dynamic=False,
        strategy=QuantizationStrategy.CHANNEL if whole else QuantizationStrategy.GROUP,
        group_size=None if whole else group,
    )
