"""The one error that users of bitpress need to catch."""


class BitpressError(ValueError):
    """Something the user can mend: the message names what is wrong, where, and the way out."""
