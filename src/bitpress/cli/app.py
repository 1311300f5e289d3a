"""What all commands share: the application, and how it ends where something is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)
# The exit status of a command that was asked for what cannot be.
REFUSED = 2


@app.callback()
def bitpress() -> None:
    """Compress models by a recipe."""


@contextmanager
def spoken_errors() -> Iterator[None]:
    """Print what is wrong in a line, without a traceback, and end with status 2."""
    from bitpress.errors import BitpressError

    try:
        yield
    except (BitpressError, OSError) as error:
        typer.echo(f"bitpress: {error}", err=True)
        raise typer.Exit(REFUSED) from error
