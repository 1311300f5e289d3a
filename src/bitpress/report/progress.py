"""One line of progress for the whole run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitpress.pipelines.solving import Progress as Step


@contextmanager
def progress_display(total: int, *, show: bool | None = None) -> Iterator[Callable[[Step], None]]:
    """What to call at each step; it shows blocks done, the current block and phase, and the time left.

    Args:
        total: blocks in all.
        show: True or False; None shows it where standard error is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("blocks"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda step: bar.update(
            task, completed=step.done, total=step.total, description=f"{step.phase:<9} {step.block}"
        )
        bar.update(task, completed=total, description="done")
