"""Models that compute from packed weights, with no server."""

from bitpress.runtime.loading import load
from bitpress.runtime.packing import pack, unpack

__all__ = ["load", "pack", "unpack"]
