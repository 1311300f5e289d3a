"""The head of a safetensors file: where each tensor's bytes are, and nothing believed that can be checked.

A file is eight bytes (the length of the header, little-endian), the header (JSON, padded with spaces to a multiple of
eight), and the tensors' bytes without gaps: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import BitpressError

# In the order in which safetensors writes them: last to first, so that every tensor is aligned.
_ASCENDING = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, kind) for name, kind in _ASCENDING.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
# What safetensors accepts.
MAX_HEADER = 100_000_000
_LENGTH = 8
_METADATA = "__metadata__"
_MAX_INT = (1 << 63) - 1


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is.

    Attributes:
        file: the safetensors file.
        dtype: of the values.
        shape: of the tensor.
        start: its first byte in the file.
        nbytes: how many there are.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def meta(self) -> Tensor:
        """A tensor of this dtype and shape without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def write_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], file: Path, metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, StoredTensor]]:
    """The bytes before the first tensor, byte for byte those of safetensors' ``save_file``, and each tensor's place.

    Args:
        tensors: dtypes and shapes by name.
        file: for the places.
        metadata: strings; safetensors writes more than one in no fixed order, here it is that of the mapping.
    """
    header: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    offset = 0
    sizes = {}
    for name in sorted(tensors, key=lambda name: (-_RANK[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        sizes[name] = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + sizes[name]],
        }
        offset += sizes[name]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    first = _LENGTH + len(text)
    places = {
        name: StoredTensor(file, *tensors[name], first + header[name]["data_offsets"][0], size)
        for name, size in sizes.items()
    }
    return len(text).to_bytes(_LENGTH, "little") + text, places


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Each tensor's place in a file, and the file's metadata.

    Raises:
        BitpressError: the file cannot be read, was cut short, or its header contradicts itself or the file's size.
    """
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            length = int.from_bytes(opened.read(_LENGTH), "little")
            if size < _LENGTH or length > min(MAX_HEADER, size - _LENGTH):
                raise _damaged(file, f"its {size} bytes cannot hold the header that it states ({length} bytes)")
            text = opened.read(length)
    except OSError as error:
        raise BitpressError(f"{file} cannot be read: {error.strerror or error}.") from error
    header = _parsed(text, file)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "the metadata of its header are no strings")
    first = _LENGTH + length
    places = {name: _place(file, name, info, first) for name, info in header.items()}
    _check_whole(file, places, first, size)
    return places, metadata


def _parsed(text: bytes, file: Path) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no mapping")
    return header


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _place(file: Path, name: str, info: Any, first: int) -> StoredTensor:
    if not isinstance(info, dict):
        raise _damaged(file, f"its header says nothing of the tensor {name!r}")
    kind: Any = info.get("dtype")
    shape: Any = info.get("shape")
    offsets: Any = info.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _damaged(file, f"the tensor {name!r} has a dtype that is not known ({kind!r})")
    if not _are_sizes(shape) or math.prod(max(1, n) for n in shape) > _MAX_INT:
        raise _damaged(file, f"the tensor {name!r} has no shape ({shape!r})")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"the tensor {name!r} has no place ({offsets!r})")
    dtype = DTYPES[kind]
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise _damaged(file, f"the tensor {name!r} ({kind}, {shape}) does not fill its {end - start} bytes")
    return StoredTensor(file, dtype, tuple(shape), first + start, end - start)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and 0 <= n <= _MAX_INT for n in found)


def _check_whole(file: Path, places: Mapping[str, StoredTensor], first: int, size: int) -> None:
    """Every byte behind the header belongs to one tensor."""
    end = first
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if place.start != end:
            what = "overlaps another" if place.start < end else "has a gap before it"
            raise _damaged(file, f"the tensor {name!r} {what}")
        end += place.nbytes
    if end != size:
        what = "was cut short" if size < end else "is longer than its tensors"
        raise _damaged(file, f"it {what}: it has {size} bytes, and its header states {end}")


def _damaged(file: Path, why: str) -> BitpressError:
    return BitpressError(f"{file} is damaged: {why}. Copy or download it again.")
