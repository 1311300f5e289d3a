"""What a checkpoint on the disk holds, compressed or not: layer by layer, without the model.

Only headers are read to open it, and the tensors of one layer to look at that.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bitpress.checkpoints.directory import CONFIG_FILE, read_config
from bitpress.checkpoints.formats.opening import Checkpoint
from bitpress.checkpoints.shards import Shards
from bitpress.checkpoints.source import directory_of
from bitpress.errors import BitpressError
from bitpress.quantization import QuantizationScheme

DENSE = "dense"
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Part:
    """A weight of two or more dimensions, quantized or not, with what is stored beside it.

    Attributes:
        name: what its tensors' names begin with; of a tensor that is no ``weight``, its whole name.
        shape: of the weight, (out, in) where it is a layer's.
        nbytes: of all its tensors: weight, scales, zero points, bias.
        scheme: how it is quantized; None if it is not.
        dtype: of the weight that is not quantized; None if it is.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    scheme: QuantizationScheme | None = None
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """A checkpoint, opened.

    Attributes:
        format: "compressed-tensors", "awq", "gptq", or "dense" for one that is not compressed.
        shards: its tensors.
        parts: its weights, in the order of the files.
        checkpoint: reads those that are quantized; None if none is.
    """

    format: str
    shards: Shards
    parts: Mapping[str, Part]
    checkpoint: Checkpoint | None

    @classmethod
    def of(cls, source: str | os.PathLike[str]) -> "Contents":
        """Open the checkpoint in a directory, or of a hub id.

        Raises:
            BitpressError: there is none, a file is missing or damaged, or the format is not read.
        """
        if Path(source).expanduser().is_file():
            raise BitpressError(f"{source} is a file: give the directory of a checkpoint in safetensors.")
        directory = directory_of(source)
        shards = Shards.of(directory)
        checkpoint = Checkpoint.of(directory, to_convert=False) if _is_compressed(directory) else None
        by_owner: dict[str, list[str]] = {}
        for name in shards:
            by_owner.setdefault(name.rpartition(".")[0], []).append(name)
        parts: dict[str, Part] = {}
        quantized = {} if checkpoint is None else checkpoint.layers
        for owner, tensors in by_owner.items():
            nbytes = sum(shards[each].nbytes for each in tensors)
            if owner in quantized:
                layer = quantized[owner]
                parts[owner] = Part(owner, layer.shape, nbytes, _as_stated(checkpoint, layer.scheme))
                continue
            wide = [each for each in tensors if len(shards[each].shape) > 1 and shards[each].dtype.is_floating_point]
            beside = nbytes - sum(shards[each].nbytes for each in wide)
            for each in wide:
                is_weight = each.endswith(_WEIGHT)
                name, size = (owner, shards[each].nbytes + beside) if is_weight else (each, shards[each].nbytes)
                parts[name] = Part(name, shards[each].shape, size, dtype=shards[each].dtype)
        return cls(DENSE if checkpoint is None else checkpoint.format, shards, parts, checkpoint)

    def weight(self, part: Part) -> Tensor:
        """Its values as a reader computes them: float32, of ``part.shape``."""
        if part.scheme is None or self.checkpoint is None:
            name = f"{part.name}{_WEIGHT}"
            return self.shards.read(name if name in self.shards else part.name).float()
        layer = self.checkpoint.layers[part.name]
        return self.checkpoint.read(layer, torch.float32).dequantize().float()

    def steps(self, part: Part) -> Tensor:
        """How far apart the points of its grids are: float32, one for each scale; none if it is not quantized."""
        if part.scheme is None or self.checkpoint is None:
            return torch.empty(0)
        return self.checkpoint.steps(self.checkpoint.layers[part.name])


def _is_compressed(directory: Path) -> bool:
    return (directory / CONFIG_FILE).is_file() and bool(read_config(directory).get("quantization_config"))


def _as_stated(checkpoint: Checkpoint | None, scheme: QuantizationScheme) -> QuantizationScheme:
    """The scheme, symmetric where a foreign format says so: it is opened without a look at the zero points."""
    stated = {} if checkpoint is None else checkpoint.stated
    if not (stated.get("sym") or stated.get("zero_point") is False):
        return scheme
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update={"symmetric": True})})
