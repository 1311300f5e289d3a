"""A compressed checkpoint whose every byte has its place before any is computed."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoints.attached import attached_layers
from bitpress.checkpoints.layout import MAX_SHARD_SIZE, Layout
from bitpress.checkpoints.saving import WEIGHTS_FILE, StoredForm, stored_form, write_quantization_config
from bitpress.checkpoints.shards import Shards
from bitpress.checkpoints.skeleton import Skeleton, stand_ins
from bitpress.models.experts import find_layer
from bitpress.models.linears import weight_matrix
from bitpress.quantization import PackedWeight, QuantizationScheme
from bitpress.solvers import packed_to_nearest


@dataclass(frozen=True)
class PlannedCheckpoint:
    """What will be written, by transformers' own ``save_pretrained`` but for the tensors' bytes.

    Attributes:
        layout: of the files that hold the tensors.
        form: which of them are packed.
        beside: the directory with the files that belong beside them, the configs.
    """

    layout: Layout
    form: StoredForm
    beside: Path

    def write_beside(self, directory: Path) -> None:
        """Put the files that hold no tensors in a directory."""
        for file in self.beside.iterdir():
            shutil.copy(file, directory / file.name)


def plan_checkpoint(
    skeleton: Skeleton,
    schemes: Mapping[str, QuantizationScheme],
    scratch: Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> PlannedCheckpoint | None:
    """Plan the checkpoint of a model that is not in memory.

    Args:
        skeleton: the model; its layers are given their schemes.
        schemes: of weights, by the layers' names.
        scratch: an empty directory, for the files beside the tensors.
        max_shard_size: see :class:`Layout`.

    Returns:
        None if no reader takes any of these layers packed.
    """
    model: Any = skeleton.model
    for name, scheme in schemes.items():
        find_layer(model, name).quantization_scheme = scheme
    packed = _stand_ins(skeleton, schemes)
    form = stored_form(model, model.state_dict(), attached_layers(model), packed, {})
    if form.config is None:
        return None
    # What transformers leaves out (tied weights, for one), and what it writes beside the weights, it says itself.
    options = {"save_original_format": False}
    type(model).save_pretrained(model, scratch, state_dict=stand_ins(form.tensors), **options)
    kept = set(Shards.of(scratch))
    (scratch / WEIGHTS_FILE).unlink()
    write_quantization_config(scratch, form.config)
    tensors = {name: tensor for name, tensor in form.tensors.items() if name in kept}
    layout = Layout.of(tensors, max_shard_size=max_shard_size, total_parameters=model.num_parameters())
    return PlannedCheckpoint(layout, form, scratch)


def _stand_ins(skeleton: Skeleton, schemes: Mapping[str, QuantizationScheme]) -> dict[str, PackedWeight]:
    """Weights of the shapes and dtypes that each layer's will have; layers that are alike share theirs."""
    made: dict[Any, PackedWeight] = {}
    found = {}
    for name, scheme in schemes.items():
        weight: Tensor = weight_matrix(find_layer(skeleton.model, name))
        key = (weight.shape, weight.dtype, id(scheme.weights))
        if key not in made:
            made[key], _ = packed_to_nearest(torch.zeros(weight.shape, dtype=weight.dtype), scheme.weights)
        found[name] = made[key]
    return found


def scratch_directory() -> "tempfile.TemporaryDirectory[str]":
    """Where a plan is made."""
    return tempfile.TemporaryDirectory(prefix="bitpress.")
