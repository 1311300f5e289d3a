"""Activations on the disk, or on the host: those of batches whose forward waits, while another batch runs."""

import ctypes
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
    """Moves what calls wait with away, and back: to files, or from a device to the host's memory.

    The memory of a tensor is emptied, not the tensor: whoever else holds it, as the model's forward does, has it back
    with it. Only the first tensor of a call goes, the hidden state: that no other batch has it is certain if it is what
    the block before has just given, or the model's own code for its first block. Masks and rotary embeddings stay.

    Args:
        directory: for files without names, which are gone with the process; None for the host's memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._out: dict[int, list[tuple[UntypedStorage, int, int]]] = {}
        self._files: dict[int, int] = {}
        self._hosted: dict[int, Tensor] = {}

    def out(self, index: int, storages: Sequence[UntypedStorage]) -> None:
        """Move away what a batch waits with: memory that nobody else has."""
        found = {_identity(storage): storage for storage in storages}
        if not found:
            return
        moved, end = [], 0
        for storage in found.values():
            moved.append((storage, end, storage.nbytes()))
            end += storage.nbytes()
        if self._directory is None and (index not in self._hosted or len(self._hosted[index]) < end):
            # Copies from and to pinned memory take their turn with what the device computes: nobody waits.
            pinned = moved[0][0].device.type == "cuda"
            self._hosted[index] = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        for storage, start, size in moved:
            if self._directory is None:
                self._hosted[index][start : start + size].copy_(_bytes(storage), non_blocking=True)
            else:
                _write(self._file(index), storage if storage.device.type == "cpu" else storage.cpu(), start)
        for storage, _, _ in moved:
            storage.resize_(0)
        self._out[index] = moved

    def back(self, index: int) -> None:
        """Have in memory again what the calls of a batch wait with."""
        for storage, start, size in self._out.pop(index, ()):
            storage.resize_(size)
            if self._directory is None:
                _bytes(storage).copy_(self._hosted[index][start : start + size], non_blocking=True)
            elif storage.device.type == "cpu":
                _read(self._files[index], storage, start)
            else:
                host = UntypedStorage(size)
                _read(self._files[index], host, start)
                storage.copy_(host)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            os.close(file)
        self._files, self._hosted, self._out = {}, {}, {}

    def _file(self, index: int) -> int:
        if index not in self._files:
            descriptor, name = tempfile.mkstemp(prefix=".activations.", dir=self._directory)
            Path(name).unlink()
            self._files[index] = descriptor
        return self._files[index]


def make_spill(state: State, storages: Sequence[UntypedStorage], batches: int) -> Spill | None:
    """What moves the activations of ``batches`` away, each like these; None if they stay where they are.

    What a device has no room for goes to the host, and what the host has no room for to the disk.
    """
    needed = batches * sum(storage.nbytes() for storage in storages)
    places = list(dict.fromkeys([*(storage.device for storage in storages), torch.device("cpu")]))
    for place in places if state.activations_on != "disk" else ():
        share = needed / max(1, free_memory(place))
        # What the user wants in memory has no other place than the last.
        if share < SHARE_OF_FREE or (state.activations_on == "memory" and place == places[-1]):
            return None if place == places[0] else Spill(None)
        logger.info("the activations of %d batches would take %.0f%% of what %s has free.", batches, 100 * share, place)
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
    if first is None or not first.is_floating_point() or first.dim() < 2:
        return []
    storage = first.untyped_storage()
    outputs = {_identity(x.untyped_storage()) for x in tree_leaves(given) if isinstance(x, Tensor)}
    own = given is None or _identity(storage) in outputs
    return [storage] if own and storage.nbytes() >= LEAST_BYTES and storage.resizable() else []


def _identity(storage: UntypedStorage) -> int:
    return int(storage._cdata)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


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
