"""A checkpoint that is written block by block, while the model is being solved.

What it will hold is planned before. A finished block is written to its place, and then noted in a journal; a run that
was killed reads from there what it had solved.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoints.attached import ACTIVATIONS, STATES, register_activations, scheme_of
from bitpress.checkpoints.changes import Changes, release_free_memory
from bitpress.checkpoints.journal import CHECKSUMS, Journal
from bitpress.checkpoints.layout import ShardWriter
from bitpress.checkpoints.packed import KINDS
from bitpress.checkpoints.planned import Planned
from bitpress.checkpoints.shards import Shards
from bitpress.checkpoints.source import parameter_or_buffer
from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.experts import find_layer
from bitpress.models.linears import weight_matrix
from bitpress.quantization import PackedWeight, QuantizedWeight

# What is in no block has its own line in the journal.
OUTSIDE = "outside of the blocks"


class Output(Changes):
    """The checkpoint of a model that stays on the disk.

    Attributes:
        plan: what it will hold.
        source: the model.
    """

    def __init__(self, plan: Planned) -> None:
        super().__init__()
        self.plan, self.source = plan, plan.source
        self._stored = plan.stored
        self._packed: dict[str, PackedWeight] = {}
        self._journal: Journal | None = None

    def start(self, draft: Path, journal: Journal) -> None:
        """Open the files in ``draft``; what the journal says of an earlier run, and is there, is kept.

        Raises:
            BitpressError: there is no room on the disk.
        """
        self._draft, self._journal = draft, journal
        self._writer = ShardWriter(draft, self.plan.layout)
        self._entries = journal.verify(self._writer)

    def follow(self, draft: Path, entries: dict[str, dict[str, Any]]) -> None:
        """Instead of :meth:`start`, where another rank writes: take what an earlier run has solved from its files."""
        self._draft, self._entries = draft, entries

    def notes(self, label: str) -> dict[str, Any] | None:
        """What :meth:`finish` noted of a block that an earlier run has finished; None of any other."""
        entry = self._entries.get(label)
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
        if self._journal is None:
            return
        for name, tensors in activations.items():
            module = find_layer(self.plan.saved, name)
            register_activations(module, tensors, torch.empty(0, dtype=next(module.parameters()).dtype))
        model = self.source.model
        state = {name: parameter_or_buffer(model, name) for name in self.plan.names if block.holds(name)}
        tensors = self._stored.tensors(
            self.plan.saved, state, self._packed, [n for n in activations if n in self.plan.attentions]
        )
        self._write(block.name, tensors, notes)
        self._packed = {}

    def restore(self, block: Block) -> dict[str, dict[str, Tensor]]:
        """Give the block, whose parameters are present, the values that an earlier run has solved.

        Returns:
            The tensors of its static activations, by the name of layer or attention.
        """
        written = Shards.of(self._draft)
        for name in (n for n in self.plan.names if block.holds(n) and n in self._stored.dense):
            value = written.read(self._stored.dense[name])
            parameter_or_buffer(self.source.model, name).copy_(value)
        for name, stored in self._stored.experts.items():
            if name in block.layers:
                weight_matrix(block.layers[name]).copy_(written.read(f"{stored}.weight"))
        for name in (n for n in block.layers if n in self._stored.layers):
            tensors = self._tensors_of(written, self._stored.layers[name], KINDS)
            weight = weight_matrix(block.layers[name])
            args = scheme_of(find_layer(self.plan.saved, name)).weights
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
        self._note(label, checksums, notes)

    def _note(self, label: str, checksums: dict[str, str], notes: dict[str, Any]) -> None:
        assert self._journal is not None, "only a rank that writes gets here"  # noqa: S101
        self._journal.record(label, {CHECKSUMS: checksums, "notes": notes})

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
        self._note(OUTSIDE, checksums, {})
        missing = self._writer.missing()
        if missing:
            raise BitpressError(f"{missing[0]} was never written: use stream=False, and report this.")

    def close(self) -> None:
        """Close all files."""
        self._writer.close()
