"""inspect: what is in a checkpoint, without loading it."""

import os
from collections.abc import Sequence

import torch

from bitpress.checkpoints.contents import Contents, Part
from bitpress.errors import BitpressError
from bitpress.report.describing import describe, in_order, matches
from bitpress.report.histogram import Histogram
from bitpress.report.inspection import Inspection, LayerSize


@torch.no_grad()
def inspect(
    source: str | os.PathLike[str], layers: Sequence[str] | None = None, *, each: bool | None = None
) -> Inspection:
    """What a checkpoint holds: its layers, their schemes and sizes, and how their scales are spread.

    No model is built, and no weight is read: headers and scales are, one layer's at a time.

    Args:
        source: directory (or hub id) of a checkpoint in safetensors: compressed-tensors, AWQ, GPTQ, or not compressed.
        layers: names of those that are looked at, with ``*`` for anything; all if None.
        each: print layer by layer; by default where ``layers`` are named, and kind by kind elsewhere.

    Raises:
        BitpressError: there is no checkpoint, a file is missing or damaged, the format is not read, or no layer has
            such a name.
    """
    contents = Contents.of(source)
    names = [name for name in contents.parts if layers is None or matches(name, layers)]
    chosen = [contents.parts[name] for name in sorted(names, key=in_order)]
    if not chosen:
        first = next(iter(contents.parts), "no weight of two dimensions")
        raise BitpressError(f"{source} has no layer {', '.join(layers or ())}: it has {first}, for instance.")
    histogram = Histogram()
    sizes = tuple(_size(contents, part, histogram) for part in chosen)
    total = contents.shards.nbytes
    rest = total - sum(part.nbytes for part in contents.parts.values()) if layers is None else 0
    return Inspection(
        os.fspath(source), contents.format, len(contents.shards.files), total, sizes, rest, histogram,
        layers is not None if each is None else each,
    )  # fmt: skip


def _size(contents: Contents, part: Part, histogram: Histogram) -> LayerSize:
    steps = contents.steps(part)
    histogram.add(steps)
    scales = (float(steps.min()), float(steps.max())) if steps.numel() else None
    dtype = None if part.dtype is None else str(part.dtype).removeprefix("torch.")
    bits = 8 * part.nbytes / max(1, part.numel)
    return LayerSize(part.name, part.shape, describe(part.scheme), dtype, part.nbytes, bits, scales)
