"""What ranks do with one another: add up tensors, gather them, agree."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bitpress.errors import BitpressError


class RankError(BitpressError):
    """Another rank has failed, or is gone: the message names it."""


class Received(NamedTuple):
    """What one rank gave to :meth:`Ranks.gather`."""

    tensors: list[Tensor]
    note: Any


class Ranks:
    """A process that is alone: one rank. :class:`bitpress.ranks.group.Group` is of several.

    All ranks call the same methods in the same order; each waits for the others.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        seconds: spent exchanging, and waiting for the others to do so.
    """

    rank = 0
    size = 1
    seconds = 0.0

    @property
    def is_first(self) -> bool:
        """True on the rank that writes, warns and shows progress."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each of the tensors over all ranks, in place. All ranks have as many, of the same shapes."""

    def greatest(self, tensors: Sequence[Tensor]) -> None:
        """The greatest value of each element over all ranks, in place."""

    def least(self, tensors: Sequence[Tensor]) -> None:
        """The least value of each element over all ranks, in place."""

    def gather(self, tensors: Sequence[Tensor] = (), note: Any = None) -> list[Received]:
        """What every rank gave, by rank. Ranks may give different numbers of tensors, of any shapes and dtypes.

        A note is anything that JSON holds; tuples come back as lists.
        """
        return [Received(list(tensors), note)]

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on all; they have one shape and dtype."""
        return tensor

    def agree(self, what: str, note: Any) -> None:
        """Make sure that all ranks have the same.

        Raises:
            BitpressError: they do not; ``what`` is named.
        """
        mine = json.dumps(note)
        for rank, received in enumerate(self.gather(note=mine)):
            if received.note != mine:
                raise BitpressError(
                    f"{what} of rank {rank} are not those of rank {self.rank}: every rank starts from the same model, "
                    "recipe, data and seed."
                )

    def mine(self, count: int) -> range:
        """Which of ``count`` things, all of about the same cost, are this rank's."""
        return range(self.rank, count, self.size)

    def part(self, first: int, last: int, height: int = 1) -> slice:
        """This rank's share of the rows from ``first`` to ``last``, of which ``height`` stay together."""
        units = -(-(last - first) // height)
        cuts = (first + height * (units * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(*(min(cut, last) for cut in cuts))


ALONE = Ranks()
