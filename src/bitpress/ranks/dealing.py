"""Dealing out work that can be cut by rows, so that all ranks are done at about the same time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from bitpress.ranks.ranks import Ranks

# The time that the slowest rank takes is found to this share.
PRECISION = 0.005


@dataclass(frozen=True)
class Work:
    """Matrices that are solved together, row by row.

    Attributes:
        indices: the matrices' numbers.
        rows: of each.
        height: rows that stay together; 0 if all of a matrix do.
        fixed: the cost of any part of it, whatever its rows.
        per_row: the cost of a row, in the same unit.
    """

    indices: tuple[int, ...]
    rows: tuple[int, ...]
    height: int = 1
    fixed: float = 0.0
    per_row: float = 1.0


class Piece(NamedTuple):
    """Some rows of a matrix."""

    matrix: int
    start: int
    stop: int


class Found(NamedTuple):
    """What solving a piece gave; the note is anything that JSON holds."""

    tensors: list[Tensor]
    note: Any = None


def deal(works: Sequence[Work], size: int) -> list[list[Piece]]:
    """Each rank's pieces, in the order of the works; the same on every rank, as nothing is measured.

    The works lie in a row, which is cut where a rank has had its time: at most one work is cut at each place.
    """
    units = [(work, _units(work)) for work in works]
    best = _filled(units, size, math.inf) or []
    low, high = 0.0, sum(w.fixed + w.per_row * sum(w.rows) for w in works)
    while size > 1 and high - low > PRECISION * high:
        middle = (low + high) / 2
        found = _filled(units, size, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _filled(works: Sequence[tuple[Work, list[Piece]]], size: int, capacity: float) -> list[list[Piece]] | None:
    """The pieces if no rank may take longer than ``capacity``; None if there are too few ranks for that."""
    ranks: list[list[Piece]] = [[]]
    left = capacity
    for work, units in works:
        fixed = work.fixed
        for unit in units:
            cost = work.per_row * (unit.stop - unit.start)
            if fixed + cost > left:
                ranks.append([])
                left, fixed = capacity, work.fixed
                if len(ranks) > size or fixed + cost > left:
                    return None
            left -= fixed + cost
            fixed = 0.0
            _append(ranks[-1], unit)
    return ranks + [[] for _ in range(size - len(ranks))]


def _append(pieces: list[Piece], unit: Piece) -> None:
    """A unit that follows the last piece in one matrix becomes a part of it."""
    if pieces and pieces[-1].matrix == unit.matrix and pieces[-1].stop == unit.start:
        unit = pieces.pop()._replace(stop=unit.stop)
    pieces.append(unit)


def _units(work: Work) -> list[Piece]:
    """The smallest pieces that the work can be cut into."""
    return [
        Piece(index, start, min(start + (work.height or rows), rows))
        for index, rows in zip(work.indices, work.rows, strict=True)
        for start in range(0, rows, work.height or rows)
    ]


def share_out(
    ranks: Ranks, works: Sequence[Work], solve: Callable[[list[Piece]], list[Found]]
) -> dict[int, list[Found]]:
    """Let each rank solve its pieces, and give all of them to all.

    Args:
        ranks: the ranks.
        works: what there is to do: the same on every rank.
        solve: gives for each of some pieces what was found.

    Returns:
        What was found, by the matrices' numbers: of each the pieces, in the order of their rows.
    """
    dealt = deal(works, ranks.size)
    mine = solve(dealt[ranks.rank])
    tensors = [t for found in mine for t in found.tensors]
    notes = [[len(found.tensors), found.note] for found in mine]
    result: dict[int, list[Found]] = {index: [] for index in sorted(i for work in works for i in work.indices)}
    for pieces, received in zip(dealt, ranks.gather(tensors, notes), strict=True):
        stream = iter(received.tensors)
        for piece, (count, note) in zip(pieces, received.note, strict=True):
            result[piece.matrix].append(Found([next(stream) for _ in range(count)], note))
    return result
