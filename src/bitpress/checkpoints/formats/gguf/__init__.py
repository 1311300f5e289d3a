"""GGUF, the format of llama.cpp: one file with weights in blocks of 32, the model's shape and its tokenizer."""

from bitpress.checkpoints.formats.gguf.architectures import architecture_of
from bitpress.checkpoints.formats.gguf.blocks import block_type
from bitpress.checkpoints.formats.gguf.writing import write

__all__ = ["architecture_of", "block_type", "write"]
