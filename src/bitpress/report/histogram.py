"""How positive numbers of many magnitudes are spread: counts by powers of two, and bars of them for a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Counted four to an octave, from 2 ** -64 to 2 ** 64, and put together when shown.
_FINE, _OCTAVES = 4, 64
BARS, WIDTH = 12, 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Bin:
    """How many numbers are at least ``low`` and less than ``high``."""

    low: float
    high: float
    count: int


@dataclass
class Histogram:
    """Counts of positive numbers, tensor by tensor.

    Attributes:
        zeros: numbers that are 0; a scale should not be.
    """

    zeros: int = 0
    _counts: Tensor = field(default_factory=lambda: torch.zeros(2 * _FINE * _OCTAVES, dtype=torch.int64))

    def add(self, numbers: Tensor) -> None:
        """Count the magnitudes of a tensor of any shape."""
        found = numbers.abs().flatten()
        positive = found[found > 0]
        self.zeros += len(found) - len(positive)
        places = (positive.double().log2() * _FINE).floor().long() + _FINE * _OCTAVES
        self._counts += torch.bincount(places.clamp(0, len(self._counts) - 1), minlength=len(self._counts))

    def bins(self, most: int = BARS) -> list[Bin]:
        """At most so many, of equal ratios, from the least that is not empty to the greatest."""
        filled = self._counts.nonzero().flatten()
        if not len(filled):
            return []
        first, last = int(filled[0]), int(filled[-1]) + 1
        together = -(-(last - first) // most)
        edges = range(first, last, together)
        return [
            Bin(_value(e), _value(e + together), int(self._counts[e : min(e + together, last)].sum())) for e in edges
        ]

    def lines(self, width: int = WIDTH) -> Iterator[str]:
        """A bar of at most ``width`` characters for each bin."""
        bins = self.bins()
        most = max((each.count for each in bins), default=1)
        for each in bins:
            eighths = -(-each.count * width * 8 // most)
            bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
            yield f"{each.low:8.2g} to {each.high:8.2g}  {bar} {each.count:,}"
        if self.zeros:
            yield f"{'0':>8}               {self.zeros:,}"


def _value(place: int) -> float:
    return float(2.0 ** ((place - _FINE * _OCTAVES) / _FINE))
