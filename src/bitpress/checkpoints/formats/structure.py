"""The model of a compressed checkpoint, without weights: which layers it has, and what they are called."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpress.checkpoints.headers import StoredTensor
from bitpress.checkpoints.pretrained import stored_names
from bitpress.checkpoints.shards import Shards
from bitpress.checkpoints.source import skeleton, stored_dtype
from bitpress.checkpoints.unknown import Unknown
from bitpress.models.experts import ExpertLinear, find_layer


@dataclass(frozen=True)
class Structure:
    """The layers of a checkpoint's model.

    Attributes:
        model: on the meta device; that of transformers, or what the tensors' names tell.
        dtype: of the model.
    """

    model: Any
    dtype: torch.dtype

    @classmethod
    def of(cls, path: Path, shards: Shards, quantized: Mapping[str, tuple[int, int]]) -> "Structure":
        """Find it.

        Args:
            path: of the checkpoint.
            shards: its tensors.
            quantized: (out, in) of its quantized layers, by what their tensors' names begin with.
        """
        import transformers  # noqa: PLC0415

        floats = {name: each for name, each in shards.items() if each.dtype.is_floating_point}
        try:
            config = transformers.AutoConfig.from_pretrained(path)
        except (OSError, ValueError):
            weights = {f"{n}.weight": StoredTensor(path, torch.float16, s, 0, 0) for n, s in quantized.items()}
            parts = {n: each for n, each in floats.items() if not _is_of(n, quantized)}
            unknown = Unknown(path, parts | weights)
            return cls(unknown, next((each.dtype for each in parts.values()), torch.float32))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        dtype = stored_dtype(config, floats)
        return cls(skeleton(config, dtype, trust_remote_code=False), dtype)

    @cached_property
    def stored(self) -> dict[str, str]:
        """What each linear layer is called in the checkpoint, by its name in the model."""
        return stored_names(self.model)

    @cached_property
    def in_model(self) -> dict[str, str]:
        """What each linear layer is called in the model, by its name in the checkpoint."""
        return {stored: name for name, stored in self.stored.items()}

    def module(self, stored: str) -> nn.Module:
        """The layer that the checkpoint calls so."""
        name = self.in_model.get(stored)
        return nn.Linear(1, 1, device="meta") if name is None else find_layer(self.model, name)

    def dense_linears(self, quantized: Mapping[str, Any]) -> list[str]:
        """Linear layers that are not quantized, by their names in the model, and where they differ in the checkpoint.

        Of fused experts that are dense, the module that holds them.
        """
        names: dict[str, None] = {}
        for name, stored in self.stored.items():
            if stored in quantized:
                continue
            layer = find_layer(self.model, name)
            local = f".{layer.local}" if isinstance(layer, ExpertLinear) else ""
            names |= dict.fromkeys(each.removesuffix(local) for each in (name, stored))
        return list(names)


def _is_of(tensor: str, quantized: Mapping[str, Any]) -> bool:
    return tensor.rpartition(".")[0] in quantized
