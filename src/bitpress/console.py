"""The one place that writes to standard error: two that move the cursor would write over each other."""

from functools import cache

from rich.console import Console


@cache
def stderr() -> Console:
    """What progress and the command line's messages are written to; it looks up ``sys.stderr`` at every use."""
    return Console(stderr=True)
