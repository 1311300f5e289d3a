"""The command ``bitpress``: a file for each of its commands."""

from bitpress.cli import convert, evaluate, mappings, oneshot, plan, recipes  # noqa: F401 (the application's commands from here on)
from bitpress.cli.app import app

__all__ = ["app"]
