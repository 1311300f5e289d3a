"""compare: which layers of two checkpoints differ, and by how much."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from bitpress.checkpoints.contents import Contents, Part
from bitpress.report.comparison import Comparison, Difference
from bitpress.report.describing import describe

# The alternating least squares of scales is at its end after a few: each is two passes over the weight.
ROUNDS = 4
# Numbers that are worked on at once.
PIECE = 1 << 24
_TINY = 1e-30


@torch.no_grad()
def compare(first: str | os.PathLike[str], second: str | os.PathLike[str], *, shown: int = 20) -> Comparison:
    """Compare two checkpoints, compressed or not, weight by weight, by the names under which they are stored.

    No model is built; one layer of each is in memory at a time.

    Args:
        first: directory (or hub id) of a checkpoint in safetensors, what errors are relative to: the original, mostly.
        second: of the other.
        shown: how many layers are printed.

    Raises:
        BitpressError: one cannot be opened; see :func:`bitpress.inspect`.
    """
    a, b = Contents.of(first), Contents.of(second)
    both = [name for name in a.parts if name in b.parts]
    alike = [name for name in both if a.parts[name].shape == b.parts[name].shape]
    found = [_difference(a, b, name) for name in alike]
    found.sort(key=lambda each: -each.error)
    return Comparison(
        (os.fspath(first), os.fspath(second)),
        (a.format, b.format),
        (a.shards.nbytes, b.shards.nbytes),
        tuple(found),
        tuple(name for name in both if name not in alike),
        (tuple(n for n in a.parts if n not in b.parts), tuple(n for n in b.parts if n not in a.parts)),
        shown,
    )


def _difference(a: Contents, b: Contents, name: str) -> Difference:
    parts = a.parts[name], b.parts[name]
    before, after = a.weight(parts[0]), b.weight(parts[1])
    change = sum(float((y - x).square_().sum()) for x, y in _pieces(before, after))
    error = change / max(_TINY, sum(float(x.square().sum()) for (x,) in _pieces(before)))
    beyond = beyond_scales(before, after) if error and before.dim() == 2 else error
    return Difference(name, (_kind(parts[0]), _kind(parts[1])), (parts[0].nbytes, parts[1].nbytes), error, beyond)


def beyond_scales(before: Tensor, after: Tensor) -> float:
    """The least of sum((B − RAS)²) / sum(B²) over diagonal R and S, by alternating least squares from R = 1.

    Args:
        before: A, (out, in), float32.
        after: B, the same.
    """
    rows = torch.ones(len(before), 1)
    for _ in range(ROUNDS):
        products, squares = torch.zeros(2, before.shape[1])
        for a, b, r in _pieces(before, after, rows):
            scaled = r * a
            products += (scaled * b).sum(0)
            squares += scaled.square_().sum(0)
        columns = products / squares.clamp(min=_TINY)
        for a, b, r in _pieces(before, after, rows):
            scaled = a * columns
            torch.div((scaled * b).sum(1, keepdim=True), scaled.square().sum(1, keepdim=True).clamp_(min=_TINY), out=r)
    change = sum(float((b - r * a * columns).square_().sum()) for a, b, r in _pieces(before, after, rows))
    return change / max(_TINY, float(after.square().sum()))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time: a head over all words takes gigabytes, and copies of it would take more."""
    columns = tensors[0].numel() // max(1, len(tensors[0]))
    count = max(1, PIECE // max(1, columns))
    return zip(*(each.split(count) for each in tensors), strict=True)


def _kind(part: Part) -> str:
    return describe(part.scheme) if part.dtype is None else str(part.dtype).removeprefix("torch.")
