"""The tensors of a model on disk, read one by one."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from bitpress.checkpoints.headers import StoredTensor, read_header
from bitpress.errors import BitpressError

WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"
PICKLED = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
# The kernel reads no more at once.
_MAX_READ = 1 << 30


class Shards(Mapping[str, StoredTensor]):
    """Where each tensor of a checkpoint is, by its name; nothing is held in memory but that.

    Every header has been checked against its file, and the index against the headers. The order is that of the files,
    and within a file that of the bytes.

    Attributes:
        directory: of the checkpoint.
        files: the safetensors files, sorted by name.
        metadata: those of all headers.
    """

    def __init__(self, directory: Path, files: list[Path]) -> None:
        self.directory = directory
        self.files = files
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        for file in files:
            self._states[file] = _state(file)
            tensors, metadata = read_header(file)
            self.metadata |= metadata
            for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[0])):
                if name in self._tensors:
                    raise BitpressError(
                        f"{file} and {self._tensors[name].file} both hold {name!r}: remove the shard that is left over "
                        "from another checkpoint."
                    )
                self._tensors[name] = tensor

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> "Shards":
        """The checkpoint in a directory: model.safetensors, or shards with an index or without.

        Raises:
            BitpressError: there is none, a file is missing or damaged, or index and files contradict each other; names
                the file, the tensor and the way out.
        """
        path = Path(directory).expanduser()
        index = path / INDEX
        if (path / WHOLE).is_file():
            return cls(path, [path / WHOLE])
        if not index.is_file():
            return cls(path, _without_index(path))
        where = _weight_map(index)
        files = {name: path / name for name in sorted(set(where.values()))}
        for name, file in files.items():
            if not file.is_file():
                lost = next(tensor for tensor, of in where.items() if of == name)
                raise BitpressError(f"{index} says that {lost!r} is in {name}, and {file} does not exist: fetch it.")
        shards = cls(path, list(files.values()))
        for tensor, name in where.items():
            if tensor not in shards or shards[tensor].file != files[name]:
                raise BitpressError(
                    f"{index} says that {tensor!r} is in {name}, and it is not: index and files are of different "
                    "checkpoints, or damaged. Copy or download them again."
                )
        return shards

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.values())

    def facts(self) -> dict[str, str]:
        """What tells these files from others, without reading them: by name the size, the time and a header's hash."""
        found = {}
        for file in self.files:
            size, modified = self._states[file]
            names = [(n, str(t.dtype), t.shape, t.start) for n, t in self.items() if t.file == file]
            digest = blake2b(repr(names).encode(), digest_size=8).hexdigest()
            found[file.name] = f"{size} bytes, header {digest}, modified {modified}"
        return found

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A tensor, in memory of its own: its pages in the system's cache are not the process's.

        Args:
            name: of the tensor.
            out: to read into, of the same dtype and shape, on any device; made on the CPU if None.

        Raises:
            BitpressError: the file has been changed since its header was read, or cannot be read.
        """
        tensor = self[name]
        if out is not None and (out.dtype != tensor.dtype or tuple(out.shape) != tensor.shape):
            stored = f"{tensor.dtype} {tensor.shape}"
            raise ValueError(f"{name} is {stored}, what it is to be read into {out.dtype} {out.shape}")
        fits = out is not None and out.device.type == "cpu" and out.is_contiguous()
        into = out if fits and out is not None else torch.empty(tensor.shape, dtype=tensor.dtype)
        descriptor = self._open(tensor.file)
        try:
            _fill(memory_of(into), descriptor, tensor.start)
        except OSError as error:
            raise BitpressError(f"{tensor.file} cannot be read at {name!r}: {error.strerror or error}.") from error
        finally:
            os.close(descriptor)
        return into if out is None or fits else out.copy_(into)

    def _open(self, file: Path) -> int:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise BitpressError(f"{file} cannot be read: {error.strerror or error}.") from error
        found = os.fstat(descriptor)
        if (found.st_size, found.st_mtime_ns) != self._states[file]:
            os.close(descriptor)
            raise BitpressError(f"{file} has been changed since it was opened: start again with the model at rest.")
        return descriptor


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be read or written."""
    flat = tensor.detach().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    memory: memoryview = flat.view(torch.uint8).numpy().data
    return memory


def _fill(memory: memoryview, descriptor: int, start: int) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done : done + _MAX_READ]], start + done)
        if count == 0:
            raise OSError("it ends before the tensor does")
        done += count


def _state(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise BitpressError(f"{file} cannot be read: {error.strerror or error}.") from error
    return found.st_size, found.st_mtime_ns


def _without_index(path: Path) -> list[Path]:
    """Shards by their names, all that there should be."""
    stem = WHOLE.removesuffix(".safetensors")
    files = sorted(path.glob(f"{stem}-*-of-*.safetensors"))
    if not files:
        raise BitpressError(f"{path} {_why_no_weights(path)}")
    for file in files:
        count = re.fullmatch(rf"{stem}-\d+-of-(\d+)\.safetensors", file.name)
        if count is None or int(count[1]) != len(files):
            raise BitpressError(
                f"{path} has no {INDEX}, and {len(files)} shards beside {file.name}: fetch the index and the missing "
                "ones, or remove those of another checkpoint."
            )
    return files


def _why_no_weights(path: Path) -> str:
    if not path.is_dir():
        return "is no directory: give one that holds a checkpoint."
    pickled = next((file.name for pattern in PICKLED for file in path.glob(pattern)), None)
    if pickled is not None:
        return (
            f"holds pickled weights ({pickled}), which are not loaded, because they can run code: convert them to "
            "safetensors, with transformers' from_pretrained and save_pretrained, where you trust them."
        )
    return f"holds no checkpoint: {WHOLE} is missing."


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BitpressError(f"{index} cannot be read: {error}. Copy or download it again.") from error
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise BitpressError(f"{index} has no weight_map of tensors to files: copy or download it again.")
    for tensor, file in where.items():
        # By its name alone: in the hub's cache the files themselves are links to elsewhere.
        for path in (PurePosixPath(file), PureWindowsPath(file)):
            if path.is_absolute() or path.drive or ".." in path.parts or not file:
                raise BitpressError(f"{index} names a file outside its directory ({file!r}, for {tensor!r}).")
        if not file.endswith(".safetensors"):
            raise BitpressError(f"{index} names {file!r} for {tensor!r}: only safetensors files are read.")
    return where
