"""The command ``bitpress``: a file for each of its commands."""

from bitpress.cli import convert, mappings, oneshot, plan, recipes  # noqa: F401 (commands of the application from here on)
from bitpress.cli.app import app

__all__ = ["app"]
