"""compare: which layers of two checkpoints differ, and by how much."""

import os

import torch
from torch import Tensor

from bitpress.checkpoints.contents import Contents, Part
from bitpress.report.comparison import Comparison, Difference
from bitpress.report.describing import describe

# The alternating least squares of scales is at its end after a few: each is two passes over the weight.
ROUNDS = 4
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
    change = (after - before).square_().sum()
    error = float(change / before.square().sum().clamp(min=_TINY))
    beyond = beyond_scales(before, after) if error and before.dim() == 2 else error
    return Difference(name, (_kind(parts[0]), _kind(parts[1])), (parts[0].nbytes, parts[1].nbytes), error, beyond)


def beyond_scales(before: Tensor, after: Tensor) -> float:
    """The least of sum((B − RAS)²) / sum(B²) over diagonal R and S, by alternating least squares from R = 1.

    Args:
        before: A, (out, in), float32.
        after: B, the same.
    """
    products, squares = before * after, before.square()
    rows = torch.ones(len(before), 1)
    for _ in range(ROUNDS):
        columns = (rows * products).sum(0) / (rows.square() * squares).sum(0).clamp(min=_TINY)
        rows = (columns * products).sum(1, keepdim=True) / (columns.square() * squares).sum(1, keepdim=True).clamp(
            min=_TINY
        )
    return float((after - rows * before * columns).square_().sum() / after.square().sum().clamp(min=_TINY))


def _kind(part: Part) -> str:
    return describe(part.scheme) if part.dtype is None else str(part.dtype).removeprefix("torch.")
