"""Who is to blame when an exchange fails: ranks that fail say so, and those that say nothing any more are gone."""

import json
import threading
import time
from typing import Any

from bitpress.ranks.ranks import RankError

# Seconds between two signs of life, and after how many of silence a rank is taken for gone once an exchange failed.
BEAT = 0.5
SILENCE = 5.0
# How long a rank that fails stays, so that the others can hear of it.
STAY = 4.0
FAILURE = "failure"


class Watch:
    """A thread that gives signs of life to the store that all ranks share, and listens for failures.

    Args:
        store: a store of torch.distributed that nothing else writes to.
        rank: of this process.
        size: how many there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._failure: dict[str, Any] | None = None
        self._heard = self._lost = False
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="bitpress-ranks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more signs of life."""
        self._stop.set()
        self._thread.join(timeout=STAY)

    def check(self) -> None:
        """Raise if another rank is known to have failed."""
        if self._failure is not None:
            raise self._error()

    def culprit(self, error: Exception) -> RankError:
        """Why an exchange failed; it takes some seconds to see who is silent."""
        beats, since = self._beats(), time.monotonic()
        while time.monotonic() - since < SILENCE and not (self._failure or self._lost):
            time.sleep(BEAT / 2)
        if self._failure is None and not self._lost:
            silent = [rank for rank, (a, b) in enumerate(zip(beats, self._beats(), strict=True)) if a == b]
            gone = [rank for rank in silent if rank != self._rank]
            if gone and not self._lost:
                self._say(gone[0], "it was killed, ran out of memory, or ended before the others")
        if self._failure is not None:
            return self._error()
        if self._lost and self._rank:
            return RankError("rank 0 is gone, or the process that started the ranks")
        return RankError(f"the exchange with the other ranks failed: {error}")

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank fails, and give them the time to hear it."""
        if isinstance(error, RankError):
            return
        self._say(self._rank, f"{type(error).__name__}: {error}")
        until = time.monotonic() + STAY
        try:
            while time.monotonic() < until and int(self._store.add("heard", 0)) < self._size:
                time.sleep(BEAT / 2)
        except RuntimeError:
            return

    def _say(self, rank: int, why: str) -> None:
        """The first failure counts: the others may follow from it."""
        try:
            said = self._store.compare_set(FAILURE, "", json.dumps({"rank": rank, "why": why}))
            self._hear(said)
        except RuntimeError:
            self._lost = True

    def _error(self) -> RankError:
        failure = self._failure or {}
        return RankError(f"rank {failure.get('rank')} has failed, and so do the others: {failure.get('why')}")

    def _hear(self, said: bytes | str) -> None:
        self._failure = json.loads(said)
        if not self._heard:
            self._heard = True
            self._store.add("heard", 1)

    def _beat(self) -> None:
        self._store.add(f"beat/{self._rank}", 1)

    def _beats(self) -> list[int]:
        try:
            return [int(self._store.add(f"beat/{rank}", 0)) for rank in range(self._size)]
        except RuntimeError:
            self._lost = True
            return [-1] * self._size

    def _run(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self._beat()
                if self._failure is None and self._store.check([FAILURE]):
                    self._hear(self._store.get(FAILURE))
            except RuntimeError:
                self._lost = True
                return
