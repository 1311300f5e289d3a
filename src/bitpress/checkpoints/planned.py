"""A compressed checkpoint whose every byte has its place before any is computed."""

import copy
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints.attached import attach, attach_attention
from bitpress.checkpoints.layout import Layout
from bitpress.checkpoints.saving import plan, warn_of_readers, write_quantization_config
from bitpress.checkpoints.source import CannotStreamError, Source, parameter_or_buffer
from bitpress.checkpoints.stored import Stored
from bitpress.models.experts import find_layer
from bitpress.models.linears import weight_matrix
from bitpress.quantization import PackedWeight, QuantizationScheme, has_global_scale, stored_format
from bitpress.solvers import packed_to_nearest


@dataclass(frozen=True)
class Planned:
    """What will be written of a model that stays on the disk.

    Attributes:
        source: the model.
        saved: the model as it will be saved, without weights: it carries schemes, which the one that runs must not yet.
        names: the parameters and buffers that are saved, in any form.
        stored: what the checkpoint holds.
        layout: in which files, at which byte.
        stored_bytes: of the quantized layers' weights, scales and zero points, by the layers' names.
        attentions: those with quantized states, by name.
        packed: the form of each quantized layer's weight, by the layers' names; on the meta device.
    """

    source: Source
    saved: Any
    names: Collection[str]
    stored: Stored
    layout: Layout
    stored_bytes: dict[str, int]
    attentions: dict[str, nn.Module]
    packed: dict[str, PackedWeight]
    _read: dict[str, nn.Module]

    @classmethod
    def of(
        cls,
        source: Source,
        schemes: Mapping[str, QuantizationScheme],
        attentions: Mapping[str, Any],
        static: Mapping[str, Mapping[str, Tensor]],
        max_shard_size: int | str,
    ) -> "Planned":
        """Settle it.

        Args:
            source: the model.
            schemes: of the layers that will be quantized, by name.
            attentions: how the states of attentions will be quantized, by name.
            static: the tensors of static activations as they will be, by the name of layer or attention; of any values.
            max_shard_size: of a file.

        Raises:
            CannotStreamError: no reader takes any of it packed.
        """
        saved: Any = copy.deepcopy(source.model)
        ignored = getattr(saved, "_keys_to_ignore_on_save", None) or ()
        names = [name for name in source.parts if name not in ignored]
        state = {name: parameter_or_buffer(saved, name).to("meta") for name in names}
        packed = _packed_ones(source.model, schemes)
        for name, scheme in schemes.items():
            attach(find_layer(saved, name), scheme, packed[name], static.get(name, {}))
        for name, each in attentions.items():
            attach_attention(saved, name, each.scheme, static.get(name, {}), queries=each.queries)
        layers = {name: find_layer(saved, name) for name in schemes}
        quantized = {name: saved.get_submodule(name) for name in attentions}
        stored, read = plan(saved, state, layers, packed, quantized)
        if not read and not attentions:
            raise CannotStreamError(f"no reader takes what is quantized of a {type(saved).__name__} packed.")
        tensors = stored.tensors(saved, state, packed, attentions)
        tensors = {name: tensor.to("meta") for name, tensor in tensors.items()} | _unclaimed(source)
        layout = Layout.of(tensors, max_shard_size=max_shard_size, total_parameters=saved.num_parameters())
        stored_bytes = {name: each.nbytes(stored_format(schemes[name])) for name, each in packed.items()}
        on_meta = {name: _on_meta(each) for name, each in packed.items()}
        return cls(source, saved, names, stored, layout, stored_bytes, quantized, on_meta, read)

    def write_config(self, draft: Path) -> None:
        """Write the files beside the weights that transformers makes."""
        aside = draft / "config"
        # With no tensors: it would write its file of weights in the place of ours.
        type(self.saved).save_pretrained(self.saved, aside, state_dict={})
        for file in list(aside.iterdir()):
            if not file.name.endswith((".safetensors", ".safetensors.index.json")):
                file.rename(draft / file.name)
        shutil.rmtree(aside)
        write_quantization_config(self.saved, draft, self._read, self.stored, self.attentions)
        warn_of_readers(self.saved, self._read, self.packed)


def _unclaimed(source: Source) -> dict[str, Tensor]:
    return {name: source.shards[name].meta() for name in source.unclaimed}


def _packed_ones(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> dict[str, PackedWeight]:
    """Packed weights of any values, by the layers' names: those of one kind are one, of ones."""
    known: dict[str, PackedWeight] = {}
    found = {}
    for name, scheme in schemes.items():
        weight = weight_matrix(find_layer(model, name))
        key = f"{tuple(weight.shape)} {weight.dtype} {scheme.weights.model_dump_json()}"
        if key not in known:
            ones = torch.ones(1, dtype=weight.dtype).expand(weight.shape)
            share = torch.ones(1) if has_global_scale(scheme.weights) else None
            known[key], _ = packed_to_nearest(ones, scheme.weights, share)
        found[name] = known[key]
    return found


def _on_meta(packed: PackedWeight) -> PackedWeight:
    share = packed.global_scale
    return PackedWeight(
        packed.packed.to("meta"),
        packed.shape,
        packed.scale.to("meta"),
        packed.zero_point.to("meta"),
        packed.args,
        None if share is None else share.to("meta"),
    )
