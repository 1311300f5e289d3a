"""Activations on the disk: those of batches whose forward waits, while another batch runs."""

import ctypes
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves

from bitpress.memory import free_memory
from bitpress.models.blocks import Call
from bitpress.modifiers import State

logger = logging.getLogger(__name__)

# Activations that would take more of the free memory go to the disk.
SHARE_OF_FREE = 0.25
# Smaller tensors are not worth a file.
LEAST_BYTES = 1 << 16


class Spill:
    """Moves what calls wait with to files, and back.

    The memory of a tensor is emptied, not the tensor: whoever else holds it, as the model's forward does, has it back
    with it. Only the first tensor of a call goes, the hidden state: that no other batch has it is certain if it is what
    the block before has just given, or the model's own code for its first block. Masks and rotary embeddings stay.

    Args:
        directory: for files without names, which are gone with the process.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._out: dict[int, list[tuple[UntypedStorage, int, int]]] = {}
        self._files: dict[int, int] = {}

    def out(self, index: int, storages: Sequence[UntypedStorage]) -> None:
        """Move to the disk what a batch waits with: memory that nobody else has."""
        found = {_identity(storage): storage for storage in storages}
        if not found:
            return
        file = self._file(index)
        moved, end = [], 0
        for storage in found.values():
            size = storage.nbytes()
            _write(file, storage, end)
            moved.append((storage, end, size))
            end += size
        for storage, _, _ in moved:
            storage.resize_(0)
        self._out[index] = moved

    def back(self, index: int) -> None:
        """Have in memory again what the calls of a batch wait with."""
        for storage, start, size in self._out.pop(index, ()):
            storage.resize_(size)
            _read(self._files[index], storage, start)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            os.close(file)
        self._files, self._out = {}, {}

    def _file(self, index: int) -> int:
        if index not in self._files:
            descriptor, name = tempfile.mkstemp(prefix=".activations.", dir=self._directory)
            Path(name).unlink()
            self._files[index] = descriptor
        return self._files[index]


def make_spill(state: State, storages: Sequence[UntypedStorage], batches: int) -> Spill | None:
    """What moves the activations of ``batches`` to the disk, each like these; None if they stay in memory."""
    if state.activations_on == "memory":
        return None
    if state.activations_on is None:
        share = batches * sum(storage.nbytes() for storage in storages) / max(1, free_memory())
        if share < SHARE_OF_FREE:
            return None
        logger.info("the activations of %d batches would take %.0f%% of free memory: to disk.", batches, 100 * share)
    return Spill(state.scratch or Path(tempfile.gettempdir()))


def hidden_state(call: Call | None, given: Any) -> list[UntypedStorage]:
    """The memory of a call's first tensor, if it is worth a file and nobody but this forward can have it.

    Args:
        call: what the forward waits for; None if it has ended.
        given: the output of the block before, which it went on with; None before the first.
    """
    if call is None:
        return []
    first = next((x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)), None)
    if first is None or not first.is_floating_point() or first.dim() < 2 or first.device.type != "cpu":
        return []
    storage = first.untyped_storage()
    outputs = {_identity(x.untyped_storage()) for x in tree_leaves(given) if isinstance(x, Tensor)}
    own = given is None or _identity(storage) in outputs
    return [storage] if own and storage.nbytes() >= LEAST_BYTES and storage.resizable() else []


def _identity(storage: UntypedStorage) -> int:
    return int(storage._cdata)


def _memory(storage: UntypedStorage) -> memoryview:
    # Not by numpy, which would forbid torch to empty it.
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _write(file: int, storage: UntypedStorage, start: int) -> None:
    memory, done = _memory(storage), 0
    while done < len(memory):
        done += os.pwrite(file, memory[done:], start + done)


def _read(file: int, storage: UntypedStorage, start: int) -> None:
    memory, done = _memory(storage), 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], start + done)
        if not count:
            raise OSError("a file of activations is shorter than it was written")
        done += count
