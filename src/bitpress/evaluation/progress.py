"""One line of progress for an evaluation."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitpress.console import stderr


@contextmanager
def progress(what: str, total: int, *, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """What to call with the number of ``what`` that are done since the last call.

    Args:
        what: is counted: "windows".
        total: of them.
        show: True or False; None shows it where standard error is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda _: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
