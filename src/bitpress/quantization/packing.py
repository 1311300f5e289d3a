"""Points without gaps between them, as compressed-tensors packs them."""

import functools
import math
import sys

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

from bitpress.quantization.grid import CHUNK, FLOATS

E4M3 = torch.float8_e4m3fn
# Values that fill whole bytes, and how many bytes these are.
UNITS = {4: (2, 1), 6: (4, 3)}

# Integers that fill whole bytes: what is as wide as those that share one, and how far half of them goes to the others.
SHIFTS = {2: (torch.int32, (6, 12)), 4: (torch.int16, (4,)), 8: (torch.int8, ())}

# Up to 0.17 compressed-tensors lets no integer cross into the next word: those of 3, 5, 6 and 7 bits leave gaps.
LEAVES_GAPS: bool = pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), 3).shape[1] > 3


def pack_points(points: Tensor, args: QuantizationArgs) -> Tensor:
    """Points of a grid (out, in) as :attr:`bitpress.quantization.PackedWeight.packed` has them."""
    if args.type == QuantizationType.INT:
        return pack_integers(points, args.num_bits)
    return points if args.num_bits == 8 else pack_floats(points, args.num_bits)


def fills_words(bits: int, columns: int) -> bool:
    """True if :func:`pack_in_place` packs rows of so many integers."""
    return bits in SHIFTS and sys.byteorder == "little" and not columns % (32 // bits)


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Signed integers of ``bits`` bits (out, in), int8, as words: (out, :func:`count_words` of in), int32.

    The first value has a word's lowest bits; the last word of a row is filled with zeros.
    """
    rows, columns = values.shape
    if not fills_words(bits, columns):
        packed: Tensor = pack_to_int32(values, bits)
        return packed.contiguous()  # 0.18 and 0.19 give a part of a wider one
    words = torch.empty(rows, columns * bits // 32, dtype=torch.int32, device=values.device)
    step = max(1, CHUNK // max(1, columns))
    own, scratch = (values.new_empty(min(step, rows), columns) for _ in range(2))
    for part, out in zip(values.split(step), words.split(step), strict=True):
        pack_in_place(own[: len(part)].copy_(part), bits, out, scratch)
    return words


def count_words(bits: int, columns: int, *, gaps: bool = LEAVES_GAPS) -> int:
    """Words of a row of so many integers; by default as the installed compressed-tensors packs them."""
    return math.ceil(columns / (32 // bits)) if gaps else math.ceil(columns * bits / 32)


def repack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The words (out, n) of ``columns`` integers as the installed compressed-tensors packs them, int32.

    Versions up to 0.17 pack integers of 3, 5, 6 and 7 bits differently from later ones. The number of words tells, but
    for short rows, which are taken as they are.
    """
    found, other = words.shape[1], not LEAVES_GAPS
    if found == count_words(bits, columns) or found != count_words(bits, columns, gaps=other):
        return words
    return pack_integers(unpack_integers(words, bits, columns, gaps=other), bits)


def unpack_integers(words: Tensor, bits: int, columns: int, *, gaps: bool) -> Tensor:
    """The integers (out, columns), int8, of words with or without gaps between them."""
    index = torch.arange(columns, device=words.device)
    each = 32 // bits
    start = index // each * 32 + index % each * bits if gaps else index * bits
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    values = (wide[:, start // 32] | wide[:, start // 32 + 1] << 32) >> start % 32
    return ((values & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.int8)


def pack_in_place(values: Tensor, bits: int, out: Tensor, scratch: Tensor) -> None:
    """Pack integers that are not needed any more.

    Nothing is allocated: what is small enough for the cache costs less to pack than its fresh memory would.

    Args:
        values: (rows, columns), int8, contiguous, for which :func:`fills_words`; what is left of them is undefined.
        bits: of each.
        out: (rows, columns * bits / 32), int32: the words.
        scratch: at least as many rows of as many columns, int8, contiguous.
    """
    values.add_(-128 if bits == 8 else 1 << (bits - 1))
    # The values of a byte are side by side: each is moved to its place in the lowest byte, which alone is kept.
    wide, shifts = SHIFTS[bits]
    together, moved = values.view(-1).view(wide), scratch[: len(values)].view(-1).view(wide)
    for shift in shifts:
        together |= torch.bitwise_right_shift(together, shift, out=moved)
    places = out.view(torch.uint8)
    places.copy_((together.view(torch.uint8) if bits == 8 else together).view(places.shape))


def pack_floats(points: Tensor, bits: int) -> Tensor:
    """The codes of ``points`` (out, in), float8_e4m3fn, without gaps: (out, in * bits / 8), uint8.

    The sign is a code's highest bit; the first of the values that share a byte has its lowest bits.
    """
    values, size = UNITS[bits]
    parts = []
    for part in points.split(max(1, CHUNK // max(1, points.shape[1]))):
        indices = part.contiguous().view(torch.uint8).int()
        codes = _code_of_byte(bits, points.device)[indices].unflatten(-1, (-1, values))
        word = codes[..., 0].clone()
        for i in range(1, values):
            word |= codes[..., i] << (bits * i)
        parts.append(torch.stack([(word >> (8 * i)) & 0xFF for i in range(size)], -1).to(torch.uint8).flatten(-2))
    return torch.cat(parts)


def unpack_floats(packed: Tensor, bits: int) -> Tensor:
    """The points again, float8_e4m3fn: what :func:`pack_floats` packed."""
    values, size = UNITS[bits]
    out = torch.empty(packed.shape[0], packed.shape[1] // size * values, dtype=torch.uint8, device=packed.device)
    step = max(1, CHUNK // max(1, out.shape[1]))
    for part, of_part in zip(packed.split(step), out.split(step), strict=True):
        given = part.unflatten(-1, (-1, size)).int()
        word = given[..., 0].clone()
        for i in range(1, size):
            word |= given[..., i] << (8 * i)
        codes = torch.stack([(word >> (bits * i)) & ((1 << bits) - 1) for i in range(values)], -1)
        of_part.copy_(_byte_of_code(bits, packed.device)[codes.flatten(-2)])
    return out.view(E4M3)


@functools.cache
def _byte_of_code(bits: int, device: torch.device) -> Tensor:
    """The float8_e4m3fn, as a byte, that each code stands for."""
    floats = FLOATS[bits]
    fractions = 1 << floats.mantissa
    magnitudes = []
    for code in range(1 << (bits - 1)):
        exponent, fraction = divmod(code, fractions)
        magnitude = fraction / fractions if exponent == 0 else (1 + fraction / fractions) * 2.0 ** (exponent - 1)
        magnitudes.append(magnitude * 2.0**floats.exponent)
    values = torch.tensor([*magnitudes, *(-m for m in magnitudes)], dtype=torch.float32)
    return values.to(E4M3).view(torch.uint8).to(device)


@functools.cache
def _code_of_byte(bits: int, device: torch.device) -> Tensor:
    """The code of each float8_e4m3fn, by its byte; meaningless for those that are no point of the grid."""
    codes = torch.zeros(256, dtype=torch.int32, device=device)
    count = 1 << bits
    codes[_byte_of_code(bits, device).int()] = torch.arange(count, dtype=torch.int32, device=device)
    return codes
