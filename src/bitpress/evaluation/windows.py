"""Texts as the windows that a model reads, with the tokens of each that are scored."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor

from bitpress.errors import BitpressError


@dataclass(frozen=True, eq=False)
class Window:
    """What the model reads at once.

    Attributes:
        ids: int64, (length,).
        scored: the first position whose token is scored, at least 1; all after it are, too.
        sequence: which sequence it is cut of.
        start: the place of ``ids[0]`` in the sequence; -1 if that is a beginning-of-sequence token put before it.
    """

    ids: Tensor
    scored: int
    sequence: int
    start: int


def cut(sequence: Tensor, length: int, stride: int, *, index: int = 0, first: int | None = None) -> Iterator[Window]:
    """Windows that start every ``stride`` tokens; a token is scored once, in the first window with a token before it.

    With ``stride == length`` the windows are disjoint, and the first token of each is not scored. The last window may
    be shorter. One that would score nothing is left out.

    Args:
        sequence: int64, (tokens,).
        length: tokens of a window at most; with ``first``, that one included.
        stride: at most as many as a window has of the sequence.
        index: of the sequence.
        first: a token to put before every window.
    """
    before = [] if first is None else [torch.tensor([first])]
    length -= len(before)
    done = 0  # tokens of the sequence that earlier windows have covered
    for start in range(0, len(sequence), stride):
        piece = sequence[start : start + length]
        scored = max(1, done - start + len(before))
        ids = torch.cat([*before, piece])
        if scored < len(ids):
            yield Window(ids, scored, index, start - len(before))
        done = start + len(piece)
        if done == len(sequence):
            return


def take_windows(windows: Iterable[Window], count: int | None, where: str) -> list[Window]:
    """The first ``count`` windows, or all.

    Raises:
        BitpressError: there is none.
    """
    taken = list(islice(windows, count))
    if not taken:
        raise BitpressError(f"{where} has no token with another one before it: there is nothing to score.")
    return taken


def batches(windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    """Neighbouring windows of one length, so that nothing is padded."""
    for _, group in groupby(windows, lambda window: len(window.ids)):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))
