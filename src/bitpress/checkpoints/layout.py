"""Checkpoint files that are laid out before their tensors are there, and filled in any order.

All names, dtypes and shapes are known first, so every file has its size, its header and its room on the disk before
anything is computed. The files are, byte for byte, those of transformers' ``save_pretrained``.
"""

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from bitpress.checkpoints.headers import NAMES, StoredTensor, write_header
from bitpress.checkpoints.shards import INDEX, WHOLE, memory_of
from bitpress.errors import BitpressError

# transformers' default.
MAX_SHARD_SIZE = "50GB"
# Bytes that are written, and read back, at once.
_PIECE = 1 << 24


@dataclass(frozen=True)
class Layout:
    """Which tensor goes where.

    Attributes:
        places: by name, the tensor's place; its file is a bare name.
        headers: by the file's name, what comes before the tensors.
        sizes: by the file's name, all its bytes.
        index: what ``model.safetensors.index.json`` says; None where there is one file.
    """

    places: dict[str, StoredTensor]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    index: dict[str, Any] | None

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        metadata: Mapping[str, str] | None = None,
        total_parameters: int | None = None,
    ) -> "Layout":
        """The layout of a state dict.

        Args:
            tensors: in the order in which they fill the shards; only dtypes and shapes count ("meta" will do).
            max_shard_size: bytes, or as "5GB"; a larger tensor has a shard of its own.
            metadata: of each file's header; by default that of transformers, ``{"format": "pt"}``.
            total_parameters: what transformers' index says of the model (its ``num_parameters()``).

        Raises:
            BitpressError: safetensors has no such dtype, or no such size is known.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in NAMES:
                raise BitpressError(f"{name} is {tensor.dtype}, which safetensors files do not hold.")
        try:
            split = split_state_dict_into_shards_factory(
                dict(tensors),
                get_storage_size=_nbytes,
                # Empty tensors stay together: to transformers they share their memory.
                get_storage_id=lambda tensor: None if _nbytes(tensor) else "empty",
                filename_pattern=WHOLE.replace(".safetensors", "{suffix}.safetensors"),
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise BitpressError(f"max_shard_size {max_shard_size!r}: {error}") from error
        places: dict[str, StoredTensor] = {}
        headers, sizes = {}, {}
        for file, names in split.filename_to_tensors.items():
            of_file = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
            headers[file], placed = write_header(of_file, Path(file), metadata or {"format": "pt"})
            places |= placed
            sizes[file] = len(headers[file]) + sum(place.nbytes for place in placed.values())
        index = None
        if split.is_sharded:
            total = {} if total_parameters is None else {"total_parameters": total_parameters}
            index = {"metadata": {**total, **split.metadata}, "weight_map": split.tensor_to_filename}
        return cls(places, headers, sizes, index)

    @property
    def nbytes(self) -> int:
        """Of all files but the index."""
        return sum(self.sizes.values())

    def index_text(self) -> str:
        """The index as transformers writes it."""
        return json.dumps(self.index, indent=2, sort_keys=True) + "\n"


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Files of a layout, in a directory of drafts; each tensor is written when it is there.

    Files that an interrupted run has left, of the same layout, are taken over: what :meth:`verify` finds in them counts
    as written. Any other file of these names is replaced.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        """Give all files their room on the disk.

        Raises:
            BitpressError: there is not enough; files that were made for it are gone again.
        """
        self.directory = directory
        self.layout = layout
        self._files: dict[str, int] = {}
        self._written: set[str] = set()
        made: list[Path] = []
        try:
            for file, size in layout.sizes.items():
                path = directory / file
                if not _starts_with(path, layout.headers[file], size):
                    path.unlink(missing_ok=True)
                    made.append(path)
                self._files[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                if path in made:
                    _allocate(self._files[file], path, size)
                    _write(self._files[file], memoryview(layout.headers[file]), 0)
            if layout.index is not None:
                (directory / INDEX).write_text(layout.index_text(), encoding="utf-8")
        except BaseException as error:
            self.close()
            for path in made:
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise BitpressError(f"{directory} cannot be written to: {error}.") from error
            raise

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor in its place.

        Args:
            name: of the tensor.
            tensor: of the dtype and shape that the layout has for it; on any device, contiguous or not.

        Returns:
            The checksum of its bytes, for :meth:`verify`.

        Raises:
            BitpressError: the disk is full or fails; names the file.
        """
        place = self.layout.places[name]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {place.dtype} {place.shape}")
        checksum = 0
        memory = memory_of(tensor.detach().cpu().contiguous())
        try:
            for start in range(0, len(memory), _PIECE):
                piece = memory[start : start + _PIECE]
                checksum = zlib.crc32(piece, checksum)
                _write(self._files[str(place.file)], piece, place.start + start)
        except OSError as error:
            file = self.directory / place.file
            raise BitpressError(f"{file} cannot be written to: {error.strerror or error}.") from error
        self._written.add(name)
        return f"{checksum:08x}"

    def verify(self, name: str, checksum: str) -> bool:
        """True if the bytes in a tensor's place have that checksum: then it counts as written."""
        place = self.layout.places[name]
        found = 0
        for start in range(0, place.nbytes, _PIECE):
            count = min(_PIECE, place.nbytes - start)
            found = zlib.crc32(os.pread(self._files[str(place.file)], count, place.start + start), found)
        same = f"{found:08x}" == checksum
        if same:
            self._written.add(name)
        return same

    def missing(self) -> list[str]:
        """Names of the tensors that are not written yet."""
        return [name for name in self.layout.places if name not in self._written]

    def sync(self) -> None:
        """Return when all that was written is on the disk.

        Raises:
            BitpressError: the disk failed; names the file.
        """
        for file, descriptor in self._files.items():
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                raise BitpressError(f"{self.directory / file} cannot be written to: {error.strerror}.") from error

    def close(self) -> None:
        """Close the files; nothing is written any more."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def __exit__(self, *_: object) -> None:
        self.close()


def _starts_with(path: Path, header: bytes, size: int) -> bool:
    """True if a file has this size and header."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _allocate(descriptor: int, path: Path, size: int) -> None:
    """Have the file system set ``size`` bytes aside, where it can."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise BitpressError(f"no room on the disk: {path} needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free.")
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BitpressError(f"no room on the disk: {path} needs {size / 1e9:.2f} GB.") from error
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _write(descriptor: int, memory: memoryview, start: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], start + done)
