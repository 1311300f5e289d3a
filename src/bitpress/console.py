"""Where the package writes for people: one console for standard error, as two would write over each other's lines."""

import os
from functools import cache

from rich.console import Console

# Columns where there is no terminal to have a width: tables keep whole names, in a file or for grep.
WIDE = 160


@cache
def stderr() -> Console:
    """For progress and messages; it looks up ``sys.stderr`` at every use."""
    return _console(stderr=True)


def stdout() -> Console:
    """For what a command was asked for."""
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    stated = console.is_terminal or "COLUMNS" in os.environ
    return console if stated else Console(stderr=stderr, width=WIDE)
