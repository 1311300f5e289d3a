"""Checkpoints of other formats: AWQ, GPTQ and GGUF, made of ours and read again."""

from bitpress.checkpoints.formats.converting import FORMATS, check_format, convert

__all__ = ["FORMATS", "check_format", "convert"]
