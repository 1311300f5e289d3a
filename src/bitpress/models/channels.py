"""Which output channel of a layer may feed which input of the layers behind it."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor


def channel_maps(channels: int, width: int) -> Iterator[Tensor]:
    """The ways in which a producer's ``channels`` may feed a consumer's ``width`` inputs, the likeliest first.

    One to one; one part of a fused projection (the last: v of q, k, v, or up of gate, up; or the first); key/value
    channels that query heads share, of a projection of their own or the last part of a fused one; a part of each head
    of an interleaved fused projection, all parts of one size or not.
    """
    if channels == width:
        yield torch.arange(width)
        return
    if channels > width:
        yield torch.arange(channels - width, channels)
        yield torch.arange(width)
    # v alone; the last part of [q, k, v] with grouped heads; the one head of multi-query attention
    shared = [channels] if channels < width else [(channels - width) // 2]
    for part in shared:
        if part and width % part == 0:
            yield from (_repeated(part, width, head) + channels - part for head in _divisors(part))
    if channels > width and channels % width == 0:
        parts = channels // width
        for head, part in itertools.product(_divisors(width), range(parts - 1, -1, -1)):
            index = torch.arange(width)
            yield index // head * parts * head + part * head + index % head
    if channels > width:
        yield from _unequal_parts(channels, width)
        yield from _grouped_interleaved(channels, width)


def _repeated(part: int, width: int, head: int) -> Tensor:
    """Each head of ``head`` channels feeds width / part heads that follow one another."""
    index = torch.arange(width)
    return index // (head * (width // part)) * head + index % head


def _unequal_parts(channels: int, width: int) -> Iterator[Tensor]:
    """[head, (another part, this part)]: the keys and values of latent attention, of unequal size."""
    if channels % width == 0:
        return
    index = torch.arange(width)
    for heads in sorted(_divisors(math.gcd(channels, width)), key=lambda n: abs(width // n - 128)):
        part, slot = width // heads, channels // heads
        yield index // part * slot + slot - part + index % part


def _grouped_interleaved(channels: int, width: int) -> Iterator[Tensor]:
    """[group, (queries of the group, key, value), head]: Falcon's fused projection; the values are last of a group."""
    for head in _divisors(math.gcd(channels, width)):
        heads, slots = width // head, channels // head
        groups = (slots - heads) // 2
        if groups > 0 and slots == heads + 2 * groups and heads % groups == 0:
            per_group = heads // groups
            index = torch.arange(width)
            group = index // (head * per_group)
            yield (group * (per_group + 2) + per_group + 1) * head + index % head


def _divisors(n: int) -> list[int]:
    """Head sizes to try: the divisors of n, the usual sizes first."""
    usual = (64, 128, 96, 80, 256, 32)
    return sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (d not in usual, abs(d - 64)))
