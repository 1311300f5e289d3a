"""The command ``bitpress``: a file for each of its commands."""

from bitpress.cli import (  # noqa: F401 (the application's commands from here on)
    compare,
    convert,
    evaluate,
    inspect,
    mappings,
    oneshot,
    plan,
    recipes,
    report,
)
from bitpress.cli.app import app

__all__ = ["app"]
