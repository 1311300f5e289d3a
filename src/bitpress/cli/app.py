"""What all commands share: the application, what they say while they work, and how they end."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

# Exit statuses, beside 0; a fault of bitpress's own ends with a traceback and 1.
REFUSED, INTERRUPTED = 2, 130
ENDS = f"Exit status: 0 done; {REFUSED} refused, and said why; {INTERRUPTED} interrupted; 1 a fault in bitpress itself."

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, epilog=ENDS)


def _version(wanted: bool) -> None:
    from importlib.metadata import version

    if wanted:
        typer.echo(f"bitpress {version('bitpress')}")
        raise typer.Exit


@app.callback()
def bitpress(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Compress models by a recipe."""


@contextmanager
def speaking(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Inside the ``with`` log records are shown, and what is wrong ends the command in a line, without a traceback.

    Args:
        quiet: no bars of other libraries; of the records warnings only, as without it.
        verbose: records of what is going on, too.
    """
    from bitpress.errors import BitpressError

    try:
        with _records_shown(logging.INFO if verbose and not quiet else logging.WARNING), _bars(shown=not quiet):
            yield
    except (BitpressError, OSError) as error:
        typer.echo(f"bitpress: {error}", err=True)
        raise typer.Exit(REFUSED) from error
    except KeyboardInterrupt as error:
        typer.echo("bitpress: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def _records_shown(level: int) -> Iterator[None]:
    """Show the package's log records: above the live lines of progress in a terminal, as plain lines elsewhere."""
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    from bitpress.console import stderr

    handler: logging.Handler
    if stderr().is_terminal:
        handler = RichHandler(console=stderr(), show_time=False, show_path=False, highlighter=NullHighlighter())
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("bitpress")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Inside the ``with`` transformers and datasets draw no bars of their own, unless they are ``shown``."""
    if shown:
        yield
        return
    import datasets
    from transformers.utils import logging as of_transformers

    before = of_transformers.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    of_transformers.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if before[0]:
            of_transformers.enable_progress_bar()
        if not before[1]:
            datasets.enable_progress_bars()
