"""Searches that go on side by side, so that several take as many exchanges as one."""

from collections.abc import Generator, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor

from bitpress.ranks.ranks import Ranks

T = TypeVar("T")
# What yields tensors that are to be summed over the ranks, and returns a result.
Summing: TypeAlias = Generator[Tensor, None, T]


def in_step(searches: Sequence[Summing[T]], ranks: Ranks) -> list[T]:
    """Run searches side by side: what each yields is summed over the ranks, in place, in one exchange for all.

    Args:
        searches: the same on every rank; each yields as many tensors there, of the same shapes.
        ranks: the ranks.

    Returns:
        What each search returned.
    """
    results: dict[int, T] = {}
    while len(results) < len(searches):
        waiting = []
        for index, search in enumerate(searches):
            if index in results:
                continue
            try:
                waiting.append(next(search))
            except StopIteration as end:
                results[index] = end.value
        ranks.sum(waiting)
    return [results[index] for index in range(len(searches))]
