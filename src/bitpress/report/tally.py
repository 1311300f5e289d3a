"""How far a run is, in figures: what is done, how fast, and for how long it will go on."""

import time
from collections.abc import Callable

from bitpress.pipelines.solving import Progress as Step

# What people are told of a phase; other phases are named by the modifier that is at work, and stay as they are.
PHASES = {
    "measure": "measuring",
    "calibrate": "calibrating",
    "propagate": "passing on",
    "solve": "solving",
    "learn": "learning",
    "write": "writing",
    "distill": "distilling",
}
BLOCKS, BATCHES, TENSORS = "blocks", "batches", "tensors"
# An earlier run has done those blocks of which nothing else was heard: they say nothing about the time left.
_RESTORING = frozenset({"propagate"})


class Tally:
    """The figures of one run; it looks at the clock when it is told of a step, and prints nothing.

    Attributes:
        total: blocks in all, or what else ``unit`` names.
        done: those that are finished.
        unit: see :class:`bitpress.pipelines.solving.Progress`; where it changes, it counts from the beginning.
        block: the current one, for people.
        phase: what is done to it, for people; "" before the first step.
    """

    def __init__(self, total: int, tokens: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin.

        Args:
            total: blocks in all.
            tokens: that each block sees; 0 if it sees none.
            clock: seconds.
        """
        self.total, self.tokens = total, tokens
        self.unit, self.block, self.phase = BLOCKS, "", ""
        self._blocks = total
        self._clock = clock
        self._began = clock()
        self._start()

    def _start(self) -> None:
        self.done = 0
        self._since = self._clock()
        self._seconds = 0.0  # that those took which are counted
        self._counted = 0
        self._seen: set[str] = set()

    def take(self, step: Step) -> None:
        """Take over what a pipeline says."""
        if step.unit != self.unit:
            self._start()
        finished = step.done - self.done
        if finished > 0:
            self._finish(finished)
        self.done, self.total, self.unit, self.block = step.done, step.total, step.unit, step.block
        self.phase = PHASES.get(step.phase, step.phase)
        self._seen.add(step.phase)

    def end(self) -> None:
        """All is done."""
        if self.unit not in (BLOCKS, TENSORS):
            self._start()
            self.unit, self.total = BLOCKS, self._blocks
        self.done, self.block, self.phase = self.total, "", "done"

    def _finish(self, count: int) -> None:
        now = self._clock()
        if not self._seen <= _RESTORING:
            self._seconds += now - self._since
            self._counted += count
        self._since = now
        self._seen = set()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    @property
    def left(self) -> float | None:
        """Seconds that the blocks which are left will take, by those that are finished; None where none is, or left."""
        # Another thread may look while a step is taken over.
        counted, left = self._counted, self.total - self.done
        if not counted or left <= 0:
            return None
        return max(0.0, self._seconds / counted * left - (self._clock() - self._since))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of calibration that a block has seen, for each second that it took altogether; None as above.

        Of batches, the tokens of the model.
        """
        of_each = {BLOCKS: self.tokens, BATCHES: self.tokens / max(1, self.total)}.get(self.unit, 0)
        seconds = self._seconds
        return of_each * self._counted / seconds if of_each and seconds else None
