"""The one error that users of bitpress need to catch, and what helps them to mend it."""

import difflib
from pathlib import Path


class BitpressError(ValueError):
    """Something the user can mend: the message names what is wrong, where, and the way out."""


def nearest_file(path: Path) -> str:
    """The end of a message that ``path`` does not exist: what is like it beside it, or how far the path does exist."""
    folder = path.expanduser().parent
    try:
        beside = [each.name for each in folder.iterdir()]
    except OSError:
        return f"; there is no directory {folder}" if folder != Path() and not folder.exists() else ""
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""
