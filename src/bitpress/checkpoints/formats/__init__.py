"""Checkpoints of other formats: AWQ, GPTQ and GGUF, made of ours and read again."""

from bitpress.checkpoints.formats.converting import FORMATS, check_fits, check_format, convert
from bitpress.checkpoints.formats.opening import COMPRESSED

__all__ = ["COMPRESSED", "FORMATS", "check_fits", "check_format", "convert"]
