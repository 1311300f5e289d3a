"""Integers in 32-bit words as AutoAWQ and AutoGPTQ have them: no sign, and the value 0 moved to 2^(bits - 1)."""

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

from bitpress.quantization.packing import fills_words, pack_integers, unpack_integers


def to_words(values: Tensor, bits: int) -> Tensor:
    """Signed integers of ``bits`` bits (rows, n), int8, side by side: (rows, n * bits / 32), int32.

    The first has a word's lowest bits. One of 3 bits may begin in a word and end in the next.
    """
    if fills_words(bits, values.shape[1]):
        return pack_integers(values, bits)
    codes = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).numpy()
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(len(codes), -1)
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little")).view(torch.int32)


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """What :func:`to_words` packed: (rows, ``count``), int8."""
    words = words.contiguous()
    if fills_words(bits, count):
        values: Tensor = unpack_from_int32(words, bits, torch.Size((len(words), count)))
        return values.contiguous()
    return unpack_integers(words, bits, count, gaps=False)
