"""Sufficient statistics of a linear layer's input.

For inputs X (rows x in) and a change dW of the weight, the squared error at the layer's output is
``||X dW^T||^2 = trace(dW H dW^T)`` with the Gram matrix ``H = X^T X``: a solver that has H needs no activations.

Where X is what the compressed model feeds the layer and X' what the original would, ``D = (X' - X)^T X`` says what of
the difference a change of the weight can make up for.
"""

import enum
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.ranks import Ranks

# Columns of a panel of the Gram product: wide enough for the matrix kernel, narrow enough to skip nearly half.
PANEL = 192
DEVICE_PANEL = 2048
HALVES = (torch.bfloat16, torch.float16)


class Statistic(enum.Flag):
    """What a modifier can ask the calibration to remember of a layer's input.

    HELD_OUT brings GRAM with it: a second Gram matrix, of some of the batches that the first is of.
    """

    NONE = 0
    GRAM = enum.auto()
    MEAN_MAGNITUDE = enum.auto()
    MAX_MAGNITUDE = enum.auto()
    RANGE = enum.auto()
    HELD_OUT = enum.auto()
    DRIFT = enum.auto()


class InputStatistics:
    """Running statistics of the inputs of one layer, or of several that share their input.

    Attributes:
        features: columns of the input.
        wanted: which statistics are kept.
        rows: how many input rows (tokens) were seen.
        held_out_rows: how many of these :attr:`held_out_gram` is of.
    """

    def __init__(self, features: int, wanted: Statistic, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.wanted = wanted | Statistic.GRAM if Statistic.HELD_OUT in wanted else wanted
        self.rows = self.held_out_rows = 0
        self._lower = _zeros(self.wanted & Statistic.GRAM, (features, features), device)
        self._held_out = _zeros(wanted & Statistic.HELD_OUT, (features, features), device)
        self._sum = _zeros(wanted & Statistic.MEAN_MAGNITUDE, (features,), device)
        self._max = _zeros(wanted & Statistic.MAX_MAGNITUDE, (features,), device)
        self._low = _zeros(wanted & Statistic.RANGE, (features,), device)
        self._high = _zeros(wanted & Statistic.RANGE, (features,), device)
        self._drift = _zeros(wanted & Statistic.DRIFT, (features, features), device)
        self._mirrored: set[int] = set()

    @torch.no_grad()
    def update(self, x: Tensor, *, held_out: bool = False) -> None:
        """Take in the rows of ``x`` (..., in), any float dtype; sums are kept in float32.

        ``held_out`` rows count in all statistics, and in :attr:`held_out_gram` where that is wanted.
        """
        given = x.reshape(-1, self.features)
        x = given.float()
        self.rows += x.shape[0]
        if not x.shape[0]:
            return
        self._mirrored.clear()
        factor = given if given.is_cuda and given.dtype in HALVES else x
        if self._lower is not None:
            _add_gram(self._lower, factor)
        if self._held_out is not None and held_out:
            self.held_out_rows += x.shape[0]
            _add_gram(self._held_out, factor)
        if self._low is not None and self._high is not None:
            low, high = torch.aminmax(x, dim=0)
            torch.minimum(self._low, low, out=self._low)
            torch.maximum(self._high, high, out=self._high)
        if self._sum is None and self._max is None:
            return
        magnitude = x.abs()
        if self._sum is not None:
            # A product with ones: on a CPU faster than a sum over rows.
            self._sum.addmv_(magnitude.T, magnitude.new_ones(len(magnitude)))
        if self._max is not None:
            torch.maximum(self._max, magnitude.amax(0), out=self._max)

    @torch.no_grad()
    def compare(self, x: Tensor, original: Tensor) -> None:
        """Take in how far rows of X have drifted from the rows of X' that are their counterparts.

        Rows that are never compared count as not drifted.

        Args:
            x: (rows, in), rows that :meth:`update` takes in, too.
            original: (rows, in), what the original model feeds the layer in their place.
        """
        x = x.reshape(-1, self.features).float()
        difference = original.reshape(-1, self.features).to(x) - x
        if difference.any():
            self._needed(self._drift, Statistic.DRIFT).addmm_(difference.T, x)

    def is_finite(self) -> bool:
        """False once a NaN, an infinity or an overflow of a sum was taken in."""
        if self._drift is not None and not bool(self._drift.diagonal().isfinite().all()):
            return False
        if self._lower is not None:
            # Sums of squares: finite only if all the rest is.
            return bool(self._lower.diagonal().isfinite().all())
        return all(bool(t.isfinite().all()) for t in (self._sum, self._max, self._low, self._high) if t is not None)

    @property
    def gram(self) -> Tensor:
        """``H = X^T X``, (in, in), float32, in squared units of the activation, summed over rows."""
        return self._whole(self._needed(self._lower, Statistic.GRAM))

    @property
    def held_out_gram(self) -> Tensor:
        """The share of the held-out rows in :attr:`gram`: what is fitted without them has ``gram - held_out_gram``."""
        return self._whole(self._needed(self._held_out, Statistic.HELD_OUT))

    @property
    def mean_magnitude(self) -> Tensor:
        """mean(abs(X)) of each column: (in,), float32, in units of the activation."""
        return self._needed(self._sum, Statistic.MEAN_MAGNITUDE) / max(1, self.rows)

    @property
    def max_magnitude(self) -> Tensor:
        """max(abs(X)) of each column: (in,), float32, in units of the activation."""
        return self._needed(self._max, Statistic.MAX_MAGNITUDE)

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest value of each column, or 0: two of (in,), float32, in units of the activation."""
        return self._needed(self._low, Statistic.RANGE), self._needed(self._high, Statistic.RANGE)

    @property
    def drift(self) -> Tensor:
        """``D = (X' - X)^T X``, (in, in), float32, summed over rows; 0 where the original model fed the same."""
        return self._needed(self._drift, Statistic.DRIFT)

    def rescale(self, scales: Tensor) -> None:
        """Follow X to X / s: ``H`` becomes ``S^-1 H S^-1`` with ``S = diag(s)``. ``scales`` is (in,), > 0.

        The same smoothing of the original model would make X' / s of X': the drift goes the way of H.
        """
        inverse = scales.float().reciprocal()
        for matrix in (self._lower, self._held_out, self._drift):
            if matrix is not None:
                matrix.mul_(inverse).mul_(inverse.unsqueeze(1))
        for kept in (self._sum, self._max, self._low, self._high):
            if kept is not None:
                kept.mul_(inverse)

    def widen(self, other: "InputStatistics") -> None:
        """Let the range hold that of ``other`` too; what else there is stays as it is."""
        for own, theirs, choose in zip(self.range, other.range, (torch.minimum, torch.maximum), strict=True):
            choose(own, theirs, out=own)

    def merge(self, other: "InputStatistics") -> None:
        """Take in what ``other`` saw: the result is that of one collection over both inputs.

        Raises:
            BitpressError: the other has another width, or other statistics.
        """
        if (self.features, self.wanted) != (other.features, other.wanted):
            raise BitpressError(
                f"statistics of {self.features} columns ({self.wanted}) do not merge with "
                f"those of {other.features} ({other.wanted})."
            )
        self._mirrored.clear()
        self.rows += other.rows
        self.held_out_rows += other.held_out_rows
        if self._lower is not None and other._lower is not None:
            self._lower += other._lower
        if self._held_out is not None and other._held_out is not None:
            self._held_out += other._held_out
        if self._drift is not None and other._drift is not None:
            self._drift += other._drift
        if self._sum is not None and other._sum is not None:
            self._sum += other._sum
        if self._max is not None and other._max is not None:
            torch.maximum(self._max, other._max, out=self._max)
        if self._low is not None and other._low is not None:
            torch.minimum(self._low, other._low, out=self._low)
        if self._high is not None and other._high is not None:
            torch.maximum(self._high, other._high, out=self._high)

    def shared(self, rows: int, held_out_rows: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The tensors to be summed over the ranks, and those whose greatest and whose least values count, in place.

        Args:
            rows: of all ranks.
            held_out_rows: of all ranks.

        Returns:
            Three lists of views of what is kept, float32, each (in,) or a panel (rows, columns) of an (in, in) matrix.
        """
        self._mirrored.clear()
        self.rows, self.held_out_rows = rows, held_out_rows
        panels = [panel for t in (self._lower, self._held_out) if t is not None for panel in _panels(t)]
        summed = [*panels, *(t for t in (self._drift, self._sum) if t is not None)]
        return (
            summed,
            [t for t in (self._max, self._high) if t is not None],
            [t for t in (self._low,) if t is not None],
        )

    def clone(self) -> "InputStatistics":
        """A copy that shares nothing."""
        kept = (self._lower, self._sum, self._max, self._low, self._drift)
        device = next((t.device for t in kept if t is not None), "cpu")
        copy = InputStatistics(self.features, self.wanted, device)
        copy.merge(self)
        return copy

    def _whole(self, lower: Tensor) -> Tensor:
        """With what is above the diagonal, once after each change of what is below."""
        if id(lower) not in self._mirrored:
            _mirror(lower)
            self._mirrored.add(id(lower))
        return lower

    def _needed(self, kept: Tensor | None, name: Statistic) -> Tensor:
        if kept is None:
            raise BitpressError(f"{name} was not collected: a modifier that uses it lists it in required_statistics.")
        return kept


def pooled(parts: Sequence[InputStatistics]) -> InputStatistics:
    """The statistics of all that any of ``parts`` saw: one part itself, or a new sum of several."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].clone()
    for part in parts[1:]:
        whole.merge(part)
    return whole


def merge_all(statistics: dict[str, InputStatistics], ranks: Ranks, device: Callable[[str], torch.device]) -> None:
    """Make of each rank's statistics those of all ranks, in place.

    Layers that share their input on every rank share the object. A layer that ran on some ranks only has statistics on
    all of them afterwards.

    Args:
        statistics: by the layer's name.
        ranks: the ranks.
        device: where the statistics of a layer belong, by its name.
    """
    if ranks.size == 1:
        return
    own = list({id(each): each for each in statistics.values()}.values())
    numbers = {id(each): number for number, each in enumerate(own)}
    kinds = [[each.features, each.wanted.value, each.rows, each.held_out_rows] for each in own]
    notes = [r.note for r in ranks.gather(note=[{n: numbers[id(s)] for n, s in statistics.items()}, kinds])]
    names = dict.fromkeys(name for numbers_of, _ in notes for name in numbers_of)
    shared: dict[tuple[int | None, ...], InputStatistics] = {}
    taken: set[int] = set()
    for name in names:
        key = tuple(numbers_of.get(name) for numbers_of, _ in notes)
        if key not in shared:
            number = key[ranks.rank]
            if number is None:
                features, wanted, _, _ = next(k[i] for i, (_, k) in zip(key, notes, strict=True) if i is not None)
                shared[key] = InputStatistics(features, Statistic(wanted), device(name))
            else:
                # What another rank tells apart is told apart here.
                shared[key] = own[number].clone() if number in taken else own[number]
                taken.add(number)
        statistics.pop(name, None)
        statistics[name] = shared[key]
    kinds_of_sum: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
    for key, each in shared.items():
        of_ranks = [k[i] for i, (_, k) in zip(key, notes, strict=True) if i is not None]
        counts = (sum(of_all) for of_all in zip(*(k[2:] for k in of_ranks), strict=True))
        for kind, tensors in zip(kinds_of_sum, each.shared(*counts), strict=True):
            kind.extend(tensors)
    for exchange, tensors in zip((ranks.sum, ranks.greatest, ranks.least), kinds_of_sum, strict=True):
        exchange(tensors)


def _panels(lower: Tensor) -> list[Tensor]:
    """What is kept of a symmetric matrix."""
    return [lower[start:stop, :stop] for start, stop in _bounds(lower)]


def _bounds(lower: Tensor) -> list[tuple[int, int]]:
    """Where each panel begins and ends."""
    width = PANEL if lower.device.type == "cpu" else DEVICE_PANEL
    return [(start, min(start + width, len(lower))) for start in range(0, len(lower), width)]


def _add_gram(lower: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to panels on and below the diagonal.

    A product of two values of 16 bits is exact in float32. Where a device sums such products in float32 the result is
    that of float32 throughout but for the order of the sum, at many times the speed: within ``rows * 2^-23`` of the sum
    of magnitudes, as with float32.
    """
    for start, stop in _bounds(lower):
        first, second = x[:, start:stop].T, x[:, :stop]
        if x.dtype in HALVES:
            lower[start:stop, :stop] += torch.mm(first, second, out_dtype=torch.float32)
        else:
            lower[start:stop, :stop].addmm_(first, second)


def _mirror(lower: Tensor) -> None:
    """The panels above the diagonal from those below, in place."""
    for start, stop in _bounds(lower):
        lower[start:stop, stop:] = lower[stop:, start:stop].T


def _zeros(wanted: Statistic, shape: tuple[int, ...], device: torch.device | str) -> Tensor | None:
    return torch.zeros(shape, dtype=torch.float32, device=device) if wanted else None
