"""Joining the ranks that torchrun started, or those of the caller's own process group."""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from bitpress.errors import BitpressError
from bitpress.ranks.group import Group
from bitpress.ranks.ranks import ALONE, Ranks
from bitpress.ranks.watch import Watch

P = ParamSpec("P")
T = TypeVar("T")

# How long ranks wait for one that lives, but is not done; one that is gone is noticed at once.
PATIENCE = timedelta(hours=6)
# How long for all to start.
START = timedelta(minutes=10)
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_current: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)
_runs = 0
# Of torchrun's ranks: kept, as a second run would meet the end of the first one's.
_stores: list[Any] = []


def current() -> Ranks:
    """The ranks that this process compresses with: itself alone, unless :func:`joined` is entered."""
    return _current.get()


def is_first() -> bool:
    """False on all ranks but the first that torchrun started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0" or not _is_stated()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Inside the ``with`` the ranks that torchrun started are :func:`current`; nothing happens where there is one.

    A process group that exists already is used, and left as it is. Only rank 0 warns.

    Raises:
        RankError: another rank has failed.
        BitpressError: not all ranks came.
    """
    if _current.get() is not ALONE or not _are_many():
        yield _current.get()
        return
    own = not dist.is_initialized()
    store, group = _joined(own=own)
    watch = Watch(store, dist.get_rank(), dist.get_world_size())
    ranks = Group(group, watch)
    token = _current.set(ranks)
    try:
        with _one_voice(ranks):
            yield ranks
    except BaseException as error:
        watch.fail(error)
        raise
    finally:
        _current.reset(token)
        watch.close()
        # Whoever waits for this rank hears that it is gone.
        dist.destroy_process_group(None if own else group)


def among_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """The function, called inside :func:`joined`."""

    @functools.wraps(function)
    def together(*args: P.args, **kwargs: P.kwargs) -> T:
        with joined():
            return function(*args, **kwargs)

    return together


def _is_stated() -> bool:
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def _are_many() -> bool:
    if not dist.is_available():
        return False
    return dist.get_world_size() > 1 if dist.is_initialized() else _is_stated()


def _joined(*, own: bool) -> tuple[Any, Any]:
    """A store of our own, and a group whose exchanges nothing else takes part in."""
    # Not every build of torch has them.
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    global _runs  # noqa: PLW0603
    _runs += 1
    store: Any
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        if own:
            if not _stores:
                _stores.append(next(rendezvous("env://", timeout=START))[0])
            store, rank, size = _stores[0], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            prefix = PrefixStore(f"bitpress/group/{_runs}", store)
            dist.init_process_group(backend, store=prefix, rank=rank, world_size=size, timeout=PATIENCE)
            group = dist.group.WORLD
        else:
            store = _get_default_store()
            group = dist.new_group(backend=backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = ", ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES)
        raise BitpressError(f"not all ranks could be joined ({where}): {error}") from error
    return PrefixStore(f"bitpress/watch/{_runs}", store), group


class _Said(logging.Handler):
    """Keeps what is said, so that each thing is said once; ``aloud`` where nobody else would say it."""

    def __init__(self, *, aloud: bool) -> None:
        super().__init__(logging.WARNING)
        self.records: list[tuple[str, int, str]] = []
        self._aloud = aloud

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.name, record.levelno, record.getMessage()))
        # Python's last resort, which a handler, this one, would put out of work.
        if self._aloud and logging.lastResort is not None:
            logging.lastResort.handle(record)


@contextmanager
def _one_voice(ranks: Ranks) -> Iterator[None]:
    """Rank 0 warns; what only others have to say it says at the end."""
    logger = logging.getLogger("bitpress")
    said = _Said(aloud=ranks.is_first and not logger.hasHandlers())
    propagate, handlers = logger.propagate, list(logger.handlers)
    logger.addHandler(said)
    if not ranks.is_first:
        logger.propagate = False
        for handler in handlers:
            logger.removeHandler(handler)
    try:
        yield
        # No rank leaves while another may still need it.
        of_all = ranks.gather(note=said.records)
    finally:
        logger.removeHandler(said)
        logger.propagate = propagate
        for handler in handlers:
            logger.addHandler(handler)
    if ranks.is_first:
        own = {tuple(record) for record in of_all[0].note}
        for record in dict.fromkeys(tuple(record) for received in of_all[1:] for record in received.note):
            if record not in own:
                logging.getLogger(record[0]).log(*record[1:])
