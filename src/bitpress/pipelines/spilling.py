"""Activations on the disk: those of batches whose forward waits, while another batch runs."""

import ctypes
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, UntypedStorage, nn
from torch.utils._pytree import tree_leaves

from bitpress.models.blocks import Call

# Smaller tensors are not worth a file.
LEAST_BYTES = 1 << 16


class Spill:
    """Moves what calls wait with to files, and back.

    The memory of a tensor is emptied, not the tensor: whoever else holds it, as the model's forward does, has it back
    with it. What a model's buffers or several batches share stays in memory.

    Args:
        directory: for files without names, which are gone with the process.
        model: the model.
        keep: tensors that stay in memory.
    """

    def __init__(self, directory: Path, model: nn.Module, keep: Sequence[Tensor]) -> None:
        self._directory = directory
        own = [*model.parameters(), *model.buffers(), *keep]
        self._kept = {_identity(t.untyped_storage()) for t in own if t.device.type != "meta"}
        self._out: dict[int, list[tuple[UntypedStorage, int, int]]] = {}
        self._files: dict[int, int] = {}

    def out(self, index: int, calls: Sequence[Call]) -> None:
        """Move to the disk what the calls of a batch wait with."""
        found: dict[int, UntypedStorage] = {}
        for call in calls:
            for storage in _storages(call):
                if _identity(storage) not in self._kept:
                    found[_identity(storage)] = storage
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


def _storages(call: Call) -> Iterator[UntypedStorage]:
    for leaf in tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.device.type == "cpu":
            storage = leaf.untyped_storage()
            if storage.nbytes() >= LEAST_BYTES and storage.resizable():
                yield storage


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
