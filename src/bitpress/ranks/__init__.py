"""Several processes that compress one model together: each calibrates with its share of the data and solves its share.

Whatever is computed from shared data is shared again before anything depends on it, so that all ranks hold the same
bits. A process that is alone has one rank, and every exchange gives it back its own.
"""

from bitpress.ranks.dealing import Found, Piece, Work, deal, share_out
from bitpress.ranks.joining import among_ranks, current, is_first, joined
from bitpress.ranks.ranks import ALONE, RankError, Ranks, Received
from bitpress.ranks.stepping import Summing, in_step

__all__ = [
    "ALONE",
    "Found",
    "Piece",
    "RankError",
    "Ranks",
    "Received",
    "Summing",
    "Work",
    "among_ranks",
    "current",
    "deal",
    "in_step",
    "is_first",
    "joined",
    "share_out",
]
