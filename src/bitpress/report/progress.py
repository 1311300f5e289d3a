"""One display of progress for a whole run: two live lines in a terminal, a line now and then where there is none."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bitpress.console import stderr
from bitpress.memory import process_memory
from bitpress.pipelines.solving import OnProgress
from bitpress.pipelines.solving import Progress as Step
from bitpress.report.tally import Tally

logger = logging.getLogger(__name__)

# Looks at the live lines, a second: each costs about a thousandth of one.
REFRESHES = 2
# Seconds between two plain lines, at least; and at most, where a block takes longer.
SELDOM, OFTEN = 10.0, 60.0
BAR = 30
# Shown instead of the blocks while they are found, and the mappings proven.
STARTING = "reading the data, trying the model on a batch, proving the mappings"


@contextmanager
def progress_display(
    total: int,
    needs: Sequence[str] = (),
    *,
    tokens: int = 0,
    device: str = "cpu",
    show: bool | None = None,
    tally: Tally | None = None,
    console: Console | None = None,
) -> Iterator[OnProgress]:
    """What to call at each step; it shows blocks done, the current block and phase, tokens a second, time, memory.

    In a terminal these are two lines that change in place. Elsewhere a line is written when a block is done, but not
    more than one in :data:`SELDOM` seconds: short runs write none.

    Args:
        total: blocks in all.
        needs: lines that say what the run will need; shown first, or logged where nothing is shown.
        tokens: that each block sees.
        device: whose memory is shown beside the process's, if it is not the CPU.
        show: False shows nothing; None leaves out ``needs`` where there is no terminal.
        tally: counts; made here if None.
        console: that of standard error if None.
    """
    console = console or stderr()
    tally = tally or Tally(total, tokens)
    if show is False or (show is None and not console.is_terminal):
        for line in needs:
            logger.info("%s", line)
    else:
        for line in needs:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if show is False:
        yield lambda _: None
    elif console.is_terminal:
        with _live(lambda: live_lines(tally, device), console):
            yield tally.take
            tally.end()
    else:
        lines = _PlainLines(tally, device, console)
        yield lines.take
        lines.end()


@contextmanager
def preparing(*, show: bool | None = None, console: Console | None = None) -> Iterator[None]:
    """Inside the ``with`` a terminal says that the run is being prepared; nothing of it stays."""
    console = console or stderr()
    if show is False or not console.is_terminal:
        yield
        return
    spinner = Spinner("dots", STARTING)
    with _live(lambda: spinner, console, transient=True):
        yield


def _live(lines: Callable[[], RenderableType], console: Console, *, transient: bool = False) -> Live:
    return Live(get_renderable=lines, console=console, refresh_per_second=REFRESHES, transient=transient)


class _PlainLines:
    """Writes a line now and then."""

    def __init__(self, tally: Tally, device: str, console: Console) -> None:
        self._tally, self._device, self._console = tally, device, console
        self._written = tally.elapsed
        self._any = False

    def take(self, step: Step) -> None:
        """See :meth:`Tally.take`."""
        done = self._tally.done
        self._tally.take(step)
        since = self._tally.elapsed - self._written
        if since >= OFTEN or (self._tally.done > done and since >= SELDOM):
            self._write()

    def end(self) -> None:
        """Say that it is done, if anything was said before."""
        self._tally.end()
        if self._any:
            self._write()

    def _write(self) -> None:
        self._any, self._written = True, self._tally.elapsed
        self._console.print(plain_line(self._tally, self._device), markup=False, highlight=False, soft_wrap=True)


def live_lines(tally: Tally, device: str = "cpu") -> RenderableType:
    """How far a run is, with a bar, and what it is doing."""
    first = Table.grid(padding=(0, 1))
    times = [_time(tally.elapsed), *([f"{_time(tally.left)} left"] if tally.left is not None else [])]
    bar = ProgressBar(total=max(1, tally.total), completed=tally.done, width=BAR)
    first.add_row(bar, f"{tally.done}/{tally.total} {tally.unit}", ", ".join(times))
    second = Text(no_wrap=True, overflow="ellipsis")
    second.append(f"{tally.phase or 'starting':<12}", style="bold")
    second.append(" · ".join([*([tally.block] if tally.block else []), *_figures(tally, device)]))
    return Group(first, second)


def plain_line(tally: Tally, device: str = "cpu") -> str:
    """The same in one line."""
    doing = f"{tally.block}: {tally.phase}" if tally.block else tally.phase
    left = [f"{_time(tally.left)} left"] if tally.left is not None else []
    parts = [f"{tally.done}/{tally.total} {tally.unit}", doing, f"{_time(tally.elapsed)} gone", *left]
    return ", ".join([*parts, *_figures(tally, device)])


def _figures(tally: Tally, device: str) -> list[str]:
    rate = tally.tokens_per_second
    speed = [] if rate is None else [f"{rate:,.0f} tokens/s"]
    held = [f"{process_memory() / 1e9:.2f} GB"]
    return [*speed, *held, *([] if device == "cpu" else [f"{process_memory(device) / 1e9:.2f} GB on {device}"])]


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
