"""Ranks that are threads of one process: what they exchange, without what carries it."""

import json
import threading
from collections.abc import Callable
from typing import Any

import torch

from bitpress.ranks import ALONE, Ranks, Received
from bitpress.session import Session


class Meeting:
    """Where the threads put what they give, and wait for one another."""

    def __init__(self, size: int) -> None:
        self.given: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=300)


class Thread(Ranks):
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, len(meeting.given), meeting

    def _exchange(self, given: Any) -> list[Any]:
        self._meeting.given[self.rank] = given
        self._meeting.barrier.wait()
        everything = list(self._meeting.given)
        self._meeting.barrier.wait()
        return everything

    def _reduce(self, tensors, combine):
        everything = self._exchange([t.clone() for t in tensors])
        for tensor, parts in zip(tensors, zip(*everything, strict=True), strict=True):
            assert len({(p.shape, p.dtype) for p in parts}) == 1
            tensor.copy_(combine(torch.stack(parts)))

    def sum(self, tensors):
        self._reduce(tensors, lambda parts: parts.sum(0))

    def greatest(self, tensors):
        self._reduce(tensors, lambda parts: parts.amax(0))

    def least(self, tensors):
        self._reduce(tensors, lambda parts: parts.amin(0))

    def gather(self, tensors=(), note=None):
        everything = self._exchange(([t.clone() for t in tensors], json.dumps(note)))
        return [Received([t.clone() for t in given], json.loads(said)) for given, said in everything]

    def from_first(self, tensor):
        return self._exchange(tensor.clone())[0].clone()


def in_step(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` gives on each of so many ranks; the first error, if there is one."""
    if size == 1:
        return [work(ALONE)]
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Thread(rank, meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


def compress(ranks: Ranks, model: Any, recipe: Any, data: Any = None, **options: Any) -> Session:
    """As ``tiny.compress``, with ranks."""
    session = Session(model, recipe, **options)
    session.check()
    session.state.ranks = ranks
    session.initialize(data)
    session.run()
    session.finalize()
    return session
