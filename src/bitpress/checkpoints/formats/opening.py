"""A compressed checkpoint on the disk, whatever its format: its layers, and the weight of each when asked for."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
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
    step_sizes,
)
from bitpress.quantization.scales import read_scale
from bitpress.quantization.weights import read_grid

COMPRESSED = "compressed-tensors"
FOREIGN: Mapping[str, ModuleType] = {"awq": awq, "gptq": gptq}
# Parts of a quantization_config, and why they are refused.
UNREAD = {"sparsity_config": "is not read"}
UNCONVERTED = {**UNREAD, **dict.fromkeys(("transform_config", "kv_cache_scheme"), "no other format holds")}


@dataclass(frozen=True)
class Checkpoint:
    """A compressed checkpoint.

    Attributes:
        format: "compressed-tensors", "awq" or "gptq".
        config: its config.json without what is said of quantization.
        stated: what is said of quantization.
        shards: its tensors.
        layers: the quantized ones, by what their tensors' names begin with.
        dense: names of all other tensors.
        zeros: the least and the greatest of all signed zero points.
    """

    format: str
    config: dict[str, Any]
    stated: dict[str, Any]
    shards: Shards
    layers: dict[str, Layer]
    dense: list[str]
    zeros: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, directory: str | os.PathLike[str], *, to_convert: bool = True) -> "Checkpoint":
        """Open it; of the tensors only the zero points are read.

        Args:
            directory: of the checkpoint.
            to_convert: refuse what no other format holds, and find out which grids are symmetric. False reads no zero
                point, and leaves the grids of foreign formats asymmetric.

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
            opened = _compressed(path, config, stated, shards, UNCONVERTED if to_convert else UNREAD)
        elif kind in FOREIGN:
            opened = _foreign(kind, path, config, stated, shards)
        else:
            raise BitpressError(f"{path} is of the format {kind!r}; read are {COMPRESSED}, {' and '.join(FOREIGN)}.")
        if not opened.layers:
            raise BitpressError(f"{path} holds no quantized layer: nothing to convert.")
        return opened._with_zeros() if to_convert else opened

    @cached_property
    def structure(self) -> Structure:
        """The names of the model's layers."""
        shapes = {name: layer.shape for name, layer in self.layers.items()}
        return Structure.of(self.shards.directory, self.shards, shapes)

    @property
    def dtype(self) -> torch.dtype:
        """That of the model."""
        return self.structure.dtype

    def read(self, layer: Layer, dtype: torch.dtype | None = None) -> QuantizedWeight:
        """A layer's weight.

        Args:
            layer: the layer.
            dtype: for scales that are stored in a dtype of their own; that of the model if None.
        """
        if self.format == COMPRESSED:
            stored = self._stored(layer, KINDS)
            return PackedWeight.from_tensors(stored, layer.args, dtype or self.dtype).unpack()
        scale, zero_point = self._grid(layer)
        values = FOREIGN[self.format].points(layer, self._stored(layer, FOREIGN[self.format].POINTS))
        return QuantizedWeight(values, scale, zero_point, layer.args)

    def steps(self, layer: Layer) -> Tensor:
        """How far apart the points of a layer's grids are: float32, one for each scale that is stored."""
        if self.format != COMPRESSED:
            return self._stored(layer, ["scales"])["scales"].float()
        stored = self._stored(layer, ("weight_scale", "weight_global_scale"))
        scale = read_scale(stored["weight_scale"], layer.args, torch.float32)
        return step_sizes(scale, stored.get("weight_global_scale")).float()

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


def _compressed(
    path: Path, config: dict[str, Any], stated: dict[str, Any], shards: Shards, refused: Mapping[str, str]
) -> Checkpoint:
    for key, why in refused.items():
        if stated.get(key):
            raise BitpressError(f"{path} has a {key}, which {why}.")
    shapes = dict(_shapes(shards))
    schemes = _schemes(path, stated, shards, shapes)
    layers = {}
    for name, shape in shapes.items():
        if f"{name}.weight_g_idx" in shards:
            raise BitpressError(f"{name} is quantized with act-order (weight_g_idx), which is not read.")
        layers[name] = Layer(name, _loose(name, shape, schemes[name], shards), schemes[name])
    claimed = {f"{name}.{kind}" for name in layers for kind in KINDS}
    dense = [name for name in shards if name not in claimed]
    return Checkpoint(COMPRESSED, config, stated, shards, layers, dense)


def _loose(name: str, shape: tuple[int, int], scheme: QuantizationScheme, shards: Shards) -> tuple[int, int]:
    """The shape of a weight of floats of 4 or 6 bits, of which ``shape`` counts bytes."""
    packed = f"{name}.weight_packed" in shards and f"{name}.weight_shape" not in shards
    return (shape[0], shape[1] * 8 // int(scheme.weights.num_bits)) if packed else shape


def _schemes(
    path: Path, stated: dict[str, Any], shards: Shards, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, QuantizationScheme]:
    """The scheme of each quantized layer; which of several it is may take the model's structure to say."""
    by_target = targets_of({"quantization_config": stated})
    if len({scheme.model_dump_json(exclude={"targets"}) for scheme in by_target.values()}) == 1:
        return dict.fromkeys(shapes, next(iter(by_target.values())))
    structure = Structure.of(path, shards, shapes)
    return {name: scheme_for(structure.in_model.get(name, name), structure.module(name), by_target) for name in shapes}


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
            yield name, (stored.shape[0], stored.shape[-1])  # of floats in less than 8 bits: bytes of a row


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
    return Checkpoint(kind, config, stated, shards, layers, dense)


def _args(bits: int, group: int, *, whole: bool) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        symmetric=False,
        dynamic=False,
        strategy=QuantizationStrategy.CHANNEL if whole else QuantizationStrategy.GROUP,
        group_size=None if whole else group,
    )
