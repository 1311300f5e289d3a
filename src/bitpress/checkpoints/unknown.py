"""A checkpoint of an architecture that transformers does not know: its tensors' names and shapes are all there is.

Where a name ends in ``.weight`` and the tensor has two dimensions there is taken to be a linear layer, or an embedding
if the name says so; whatever else there is stays as it is.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bitpress.checkpoints.headers import StoredTensor
from bitpress.checkpoints.shards import Shards
from bitpress.checkpoints.source import Source, directory_of
from bitpress.errors import BitpressError

logger = logging.getLogger(__name__)

CONFIG = "config.json"
EMBEDDING = re.compile(r"embed|wte|wpe|(^|[._])tok(en)?s?([._]|$)", re.IGNORECASE)
# Weights, which are not copied.
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


class Unknown(nn.Module):
    """Modules by the names of a checkpoint's tensors, on the meta device; it has no forward.

    Attributes:
        config: what its config.json says.
        directory: of the checkpoint.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__()
        file = directory / CONFIG
        self.directory = directory
        self._stated = _read(file) if file.is_file() else {}
        self.config = SimpleNamespace(
            **{"dtype": None, **self._stated}, to_json_string=lambda: json.dumps(self._stated)
        )
        self._weight_conversions: list[Any] = []
        for name, tensor in tensors.items():
            owner, _, local = name.rpartition(".")
            if local == "weight":
                self._place(owner, _kind(owner, tensor))
        for name, tensor in tensors.items():
            owner, _, local = name.rpartition(".")
            module = self._place(owner, nn.Module())
            module.register_parameter(local, nn.Parameter(tensor.meta(), requires_grad=False))

    def _place(self, name: str, module: nn.Module) -> nn.Module:
        """The module of that name, which it is made to be if there is none."""
        found: nn.Module = self
        *owners, last = name.split(".") if name else [""]
        for part in owners:
            if part not in found._modules:
                found.add_module(part, nn.Module())
            found = found.get_submodule(part)
        if last and last not in found._modules:
            found.add_module(last, module)
        return found.get_submodule(last)

    def get_parameter_or_buffer(self, name: str) -> torch.Tensor:
        """As a transformers model has it."""
        return self.get_parameter(name)

    def num_parameters(self) -> int:
        """As a transformers model has it."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, directory: Path, state_dict: Any = None) -> None:  # noqa: ARG002
        """Write all files that are beside the weights."""
        directory.mkdir()
        for file in self.directory.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS) and not file.name.startswith("."):
                shutil.copyfile(file, directory / file.name)
        (directory / CONFIG).write_text(json.dumps(self._stated, indent=2) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BitpressError(f"{file} cannot be read: {error}. Copy or download it again.") from error
    if not isinstance(stated, dict):
        raise BitpressError(f"{file} is no JSON object: copy or download it again.")
    return stated


def _kind(name: str, tensor: StoredTensor) -> nn.Module:
    if len(tensor.shape) != 2 or not tensor.dtype.is_floating_point:
        return nn.Module()
    rows, columns = tensor.shape
    if EMBEDDING.search(".".join(name.split(".")[-2:])):
        return nn.Embedding(rows, columns, device="meta", dtype=tensor.dtype)
    return nn.Linear(columns, rows, bias=False, device="meta", dtype=tensor.dtype)


def open_by_names(source: str | os.PathLike[str]) -> Source:
    """The checkpoint of a path or hub id, as its tensors' names have it.

    Raises:
        BitpressError: see :meth:`Shards.of`; a config.json that cannot be read.
    """
    shards = Shards.of(directory_of(source))
    return Source(
        Unknown(shards.directory, shards), shards, shards.directory, {name: [name] for name in shards}, [], {}, {}, {}
    )


def log_choice(model: Unknown, chosen: Collection[str]) -> None:
    """Say which weights were taken for linear layers, and which were left."""
    kinds = (nn.Linear, nn.Embedding)
    left = [name for name, module in model.named_modules() if isinstance(module, kinds) and name not in chosen]
    message = "transformers does not know %s: %d weights are quantized by their names; left of two dimensions: %s."
    logger.info(message, model.directory, len(chosen), ", ".join(left) or "none")
