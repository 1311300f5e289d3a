"""A checkpoint that is written block by block, while the model is being solved.

What it will hold is settled before: which tensors, in which files, at which byte. A finished block is written to its
place, and then noted in a journal; a run that was killed reads from there what it had solved.
"""

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints.attached import (
    ACTIVATIONS,
    STATES,
    attach,
    attach_attention,
    register_activations,
    scheme_of,
)
from bitpress.checkpoints.changes import Changes, release_free_memory
from bitpress.checkpoints.journal import Journal
from bitpress.checkpoints.layout import Layout, ShardWriter
from bitpress.checkpoints.packed import KINDS
from bitpress.checkpoints.saving import plan, warn_of_readers, write_quantization_config
from bitpress.checkpoints.shards import Shards
from bitpress.checkpoints.source import CannotStreamError, Source, parameter_or_buffer
from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.experts import find_layer
from bitpress.models.linears import weight_matrix
from bitpress.quantization import PackedWeight, QuantizationScheme, QuantizedWeight, has_global_scale, stored_format
from bitpress.solvers import round_to_nearest

# What is in no block has its own line in the journal.
OUTSIDE = "outside of the blocks"


class Output(Changes):
    """The checkpoint of a model that stays on the disk.

    Attributes:
        layout: its files.
        stored_bytes: of the quantized layers' weights, scales and zero points, by the layers' names.
    """

    def __init__(
        self,
        source: Source,
        schemes: Mapping[str, QuantizationScheme],
        attentions: Mapping[str, Any],
        static: Mapping[str, Mapping[str, Tensor]],
        max_shard_size: int | str,
    ) -> None:
        """Settle what the checkpoint will hold.

        Args:
            source: the model.
            schemes: of the layers that will be quantized, by name.
            attentions: how the states of attentions will be quantized, by name.
            static: the tensors of static activations as they will be, by the name of layer or attention; of any values.
            max_shard_size: of a file.
        """
        super().__init__()
        self.source = source
        # The model as it will be saved, without weights: it carries schemes, which the one that runs must not yet.
        saved: Any = copy.deepcopy(source.model)
        self._saved: Any = saved
        state = {name: parameter_or_buffer(self._saved, name).to("meta") for name in source.parts}
        ignored = getattr(self._saved, "_keys_to_ignore_on_save", None) or ()
        self._state = {name: tensor for name, tensor in state.items() if name not in ignored}
        packed = _packed_ones(source.model, schemes)
        for name, scheme in schemes.items():
            attach(find_layer(self._saved, name), scheme, packed[name], static.get(name, {}))
        for name, each in attentions.items():
            attach_attention(self._saved, name, each.scheme, static.get(name, {}), queries=each.queries)
        layers = {name: find_layer(self._saved, name) for name in schemes}
        self._attentions = {name: self._saved.get_submodule(name) for name in attentions}
        self._stored, self._read = plan(self._saved, self._state, layers, packed, self._attentions)
        if not self._read and not attentions:
            raise CannotStreamError(f"no reader takes what is quantized of a {type(saved).__name__} packed.")
        tensors = self._stored.tensors(self._saved, self._state, packed, attentions)
        tensors = {name: tensor.to("meta") for name, tensor in tensors.items()} | self._unclaimed()
        self.stored_bytes = {name: each.nbytes(stored_format(schemes[name])) for name, each in packed.items()}
        self._packed_shapes = {name: _on_meta(each) for name, each in packed.items()}
        self._packed: dict[str, PackedWeight] = {}
        count = saved.num_parameters()
        self.layout = Layout.of(tensors, max_shard_size=max_shard_size, total_parameters=count)

    def _unclaimed(self) -> dict[str, Tensor]:
        shards = self.source.shards
        stored = {name: shards[name] for name in self.source.unclaimed}
        return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in stored.items()}

    def start(self, draft: Path, journal: Journal) -> None:
        """Open the files in ``draft``; what the journal says of an earlier run, and is there, is kept.

        Raises:
            BitpressError: there is no room on the disk.
        """
        self._draft, self._journal = draft, journal
        self._writer = ShardWriter(draft, self.layout)
        journal.verify(self._writer)

    def notes(self, label: str) -> dict[str, Any] | None:
        """What :meth:`finish` noted of a block that an earlier run has finished; None of any other."""
        entry = self._journal.entries.get(label)
        return None if entry is None else entry["notes"]

    @contextmanager
    def of(self, block: Block, quantized: Mapping[str, QuantizedWeight]) -> Iterator[None]:  # noqa: ARG002
        """Inside the ``with`` the block's parameters, which are present, may be written to."""
        yield
        self._packed = {name: each.pack() for name, each in quantized.items()}
        release_free_memory()

    def finish(self, block: Block, activations: Mapping[str, Mapping[str, Tensor]], notes: dict[str, Any]) -> None:
        """Write the solved block, whose parameters are present, and note it.

        Args:
            block: the block.
            activations: the tensors of its static activations, by the name of layer or attention.
            notes: what else is known of it, as JSON can hold it.
        """
        for name, tensors in activations.items():
            module = find_layer(self._saved, name)
            register_activations(module, tensors, torch.empty(0, dtype=next(module.parameters()).dtype))
        model = self.source.model
        state = {name: parameter_or_buffer(model, name) for name in self._state if block.holds(name)}
        tensors = self._stored.tensors(
            self._saved, state, self._packed, [n for n in activations if n in self._attentions]
        )
        self._write(block.name, tensors, notes)
        self._packed = {}

    def restore(self, block: Block) -> dict[str, dict[str, Tensor]]:
        """Give the block, whose parameters are present, the values that an earlier run has solved.

        Returns:
            The tensors of its static activations, by the name of layer or attention.
        """
        written = Shards.of(self._draft)
        for name in (n for n in self._state if block.holds(n) and n in self._stored.dense):
            value = written.read(self._stored.dense[name])
            parameter_or_buffer(self.source.model, name).copy_(value)
        for name, stored in self._stored.experts.items():
            if name in block.layers:
                weight_matrix(block.layers[name]).copy_(written.read(f"{stored}.weight"))
        for name in (n for n in block.layers if n in self._stored.layers):
            tensors = self._tensors_of(written, self._stored.layers[name], KINDS)
            weight = weight_matrix(block.layers[name])
            args = scheme_of(find_layer(self._saved, name)).weights
            weight.copy_(PackedWeight.from_tensors(tensors, args, weight.dtype).unpack().dequantize())
        names = {n: self._stored.layers[n] for n in block.layers if n in self._stored.layers}
        names |= {n: stored for n, stored in self._stored.attentions.items() if block.holds(n)}
        found = {n: self._tensors_of(written, stored, (*ACTIVATIONS, *STATES)) for n, stored in names.items()}
        return {name: tensors for name, tensors in found.items() if tensors}

    @staticmethod
    def _tensors_of(written: Shards, stored: str, kinds: Sequence[str]) -> dict[str, Tensor]:
        return {kind: written.read(f"{stored}.{kind}") for kind in kinds if f"{stored}.{kind}" in written}

    def _write(self, label: str, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
        checksums = {name: self._writer.write(name, tensor) for name, tensor in tensors.items()}
        self._writer.sync()
        self._journal.record(label, {"checksums": checksums, "notes": notes})

    def write_the_rest(self) -> None:
        """Write what is in no block: parameters, and tensors that no parameter is made of."""
        if self.notes(OUTSIDE) is not None:
            return
        left = set(self._writer.missing())
        checksums: dict[str, str] = {}
        for name, stored in self._stored.dense.items():
            if stored in left:
                value = self.source.read([name])[name]
                checksums[stored] = self._writer.write(stored, value)
        for name in self.source.unclaimed:
            checksums[name] = self._writer.write(name, self.source.shards.read(name))
        self._writer.sync()
        self._journal.record(OUTSIDE, {"checksums": checksums, "notes": {}})
        missing = self._writer.missing()
        if missing:
            raise BitpressError(f"{missing[0]} was never written: use stream=False, and report this.")

    def write_config(self) -> None:
        """Write the files beside the weights that transformers makes."""
        aside, saved = self._draft / "config", self._saved
        # With no tensors: it would write its file of weights in the place of ours.
        type(saved).save_pretrained(saved, aside, state_dict={})
        for file in list(aside.iterdir()):
            if not file.name.endswith((".safetensors", ".safetensors.index.json")):
                file.rename(self._draft / file.name)
        shutil.rmtree(aside)
        write_quantization_config(self._saved, self._draft, self._read, self._stored, self._attentions)
        warn_of_readers(self._saved, self._read, self._packed_shapes)

    def close(self) -> None:
        """Close all files."""
        self._writer.close()


def _packed_ones(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> dict[str, PackedWeight]:
    """Packed weights of any values, by the layers' names: those of one kind are one, of ones."""
    known: dict[str, PackedWeight] = {}
    found = {}
    for name, scheme in schemes.items():
        weight = weight_matrix(find_layer(model, name))
        key = f"{tuple(weight.shape)} {weight.dtype} {scheme.weights.model_dump_json()}"
        if key not in known:
            ones = torch.ones(weight.shape, dtype=weight.dtype)
            share = torch.ones(1) if has_global_scale(scheme.weights) else None
            known[key] = round_to_nearest(ones, scheme.weights, weight.dtype, None, share).pack()
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
