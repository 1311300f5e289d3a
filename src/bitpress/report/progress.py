"""What a run will need, and one line of progress for all of it."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitpress.pipelines.solving import Progress as Step

logger = logging.getLogger(__name__)


@contextmanager
def progress_display(
    total: int, needs: Sequence[str] = (), *, show: bool | None = None
) -> Iterator[Callable[[Step], None]]:
    """What to call at each step; it shows blocks done, the current block and phase, and the time left.

    Args:
        total: blocks in all.
        needs: lines that say what the run will need; shown first, or logged where nothing is shown.
        show: True or False; None shows it where standard error is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        for line in needs:
            logger.info("%s", line)
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
    console = Console(stderr=True)
    for line in needs:
        console.print(line, markup=False, highlight=False)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda step: bar.update(
            task, completed=step.done, total=step.total, description=f"{step.phase:<9} {step.block}"
        )
        bar.update(task, completed=total, description="done")
