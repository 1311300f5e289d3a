"""A GGUF file of a compressed checkpoint."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoints.card import renew_card
from bitpress.checkpoints.directory import PAGE_FILE, RECIPE_FILE, REPORT_FILE, check_destination, whole_directory
from bitpress.checkpoints.formats.gguf.architectures import (
    Architecture,
    add_metadata,
    architecture_of,
    extra_tensors,
    head_counts,
    interleave,
)
from bitpress.checkpoints.formats.gguf.blocks import BLOCK, SIZES, block_type, to_blocks
from bitpress.checkpoints.formats.gguf.vocabulary import add_vocabulary
from bitpress.checkpoints.formats.opening import Checkpoint
from bitpress.checkpoints.formats.rounding import Rounding
from bitpress.errors import BitpressError

FILE = "model.gguf"
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q8_0": "MOSTLY_Q8_0"}


def write(checkpoint: Checkpoint, destination: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Write ``model.gguf`` into a directory.

    Raises:
        BitpressError: llama.cpp does not know the model or a layer's grid; the gguf package is not installed.
    """
    try:
        import gguf  # noqa: PLC0415
    except ImportError as error:
        raise BitpressError('GGUF files are written by the package gguf: pip install "bitpress[gguf]".') from error

    config = checkpoint.config
    architecture = architecture_of(config)
    types = {name: block_type(layer) for name, layer in checkpoint.layers.items()}
    names = gguf.get_tensor_name_map(_arch(gguf, architecture), int(config["num_hidden_layers"]))
    called = {name: _called(names, name) for name in (*checkpoint.dense, *(f"{n}.weight" for n in types))}
    extra = extra_tensors(config)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[Counter(types.values()).most_common(1)[0][0]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, config)
    add_vocabulary(writer, checkpoint.shards.directory, int(config["vocab_size"]))
    total = 0
    for name, dtype, (rows, width) in _infos(checkpoint, types, extra):
        shape = (width,) if rows is None else (rows, width)
        count = width * (rows or 1)
        total += count
        stored = called.get(name, name)
        writer.add_tensor_info(stored, shape, _uint8(), count, raw_dtype=gguf.GGMLQuantizationType[dtype])
    path = check_destination(destination, overwrite=overwrite, needed=total)
    scales = Rounding(torch.float16)
    minima = Rounding(
        torch.float16, "minima of groups (zero point × scale)", "of a step of the grid",
        " Symmetric grids (Q4_0, Q8_0) have none.",
    )  # fmt: skip
    with whole_directory(path) as draft:
        writer.write_header_to_file(draft / FILE)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(checkpoint, extra, partial(to_blocks, scales=scales, minima=minima)):
            writer.write_tensor_data(_in_order(name, tensor, architecture, config).numpy())
        writer.close()
        for beside in (RECIPE_FILE, REPORT_FILE, PAGE_FILE):
            if (checkpoint.shards.directory / beside).is_file():
                shutil.copyfile(checkpoint.shards.directory / beside, draft / beside)
        renew_card(draft)
    scales.warn()
    minima.warn()
    return path


def _arch(gguf: Any, architecture: Architecture) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)


def _called(names: Any, stored: str) -> str:
    found: str | None = names.get_name(stored, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise BitpressError(f"llama.cpp has no name for {stored}: keep another format.")
    return found


def _uint8() -> Any:
    import numpy as np  # noqa: PLC0415

    return np.dtype(np.uint8)


def _infos(
    checkpoint: Checkpoint, types: dict[str, str], extra: dict[str, Tensor]
) -> Iterator[tuple[str, str, tuple[int | None, int]]]:
    """Name, type, and rows and bytes of a row of every tensor, in the order of :func:`_tensors`."""
    for name in checkpoint.dense:
        stored = checkpoint.shards[name]
        if stored.dtype not in _FLOATS or len(stored.shape) not in (1, 2):
            raise BitpressError(f"{name} is {stored.dtype} of shape {stored.shape}, which is not written to GGUF.")
        single = len(stored.shape) == 1
        dtype = torch.float32 if single else stored.dtype
        rows = None if single else stored.shape[0]
        yield name, _FLOATS[dtype], (rows, stored.shape[-1] * dtype.itemsize)
    for name, layer in checkpoint.layers.items():
        yield f"{name}.weight", types[name], (layer.shape[0], layer.shape[1] // BLOCK * SIZES[types[name]])
    for name, tensor in extra.items():
        yield name, _FLOATS[tensor.dtype], (None, tensor.nbytes)


def _tensors(checkpoint: Checkpoint, extra: dict[str, Tensor], to_bytes: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as bytes of rows; llama.cpp wants vectors in float32."""
    for name in checkpoint.dense:
        tensor = checkpoint.shards.read(name)
        yield name, (tensor.float() if tensor.dim() == 1 else tensor).view(torch.uint8)
    for name, layer in checkpoint.layers.items():
        yield f"{name}.weight", to_bytes(layer, checkpoint.read(layer))
    for name, tensor in extra.items():
        yield name, tensor.view(torch.uint8)


def _in_order(name: str, rows: Tensor, architecture: Architecture, config: Any) -> Tensor:
    """Queries and keys in llama.cpp's order, where it has one of its own."""
    queries, keys = head_counts(config)
    for layer, heads in (("q_proj", queries), ("k_proj", keys)):
        owner, _, kind = name.rpartition(".")
        if architecture.interleaved and owner.endswith(f".{layer}"):
            of_rows = rows if kind == "weight" else rows.view(-1, torch.float32.itemsize)
            return interleave(of_rows, heads).reshape(rows.shape)
    return rows
