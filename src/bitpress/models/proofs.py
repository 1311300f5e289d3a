"""Proof that a mapping leaves the model's function as it was, by running the block with and without it.

Random scales are powers of two: multiplying by them rounds nothing, in any float dtype, so that a block with a valid
mapping gives the same output almost to the bit, and one with an invalid mapping plainly does not. They are below 1:
what runs between the layers is driven by values up to 16 times as large, where no activation function is still almost
linear (near 0 SiLU and GELU are, and would pass in bfloat16).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitpress.models.blocks import Block
from bitpress.models.linears import in_features
from bitpress.models.smoothing import divide_outputs, multiply_inputs, out_channels


@dataclass(frozen=True)
class Proof:
    """What came of trying a mapping.

    Attributes:
        difference: how much the block's output moved with the scale moved over, relative to how much it moves when the
            balance layers are scaled and nothing makes up for it. 0 is perfect, about 1 is plain wrong; NaN if the
            balance layers have no share in the output, as an expert that sees no token.
        tolerance: the greatest difference that rounding explains.
        channel_map: (in,), int64: which output channel of the smooth layer feeds each input of the balance layers.
    """

    difference: float
    tolerance: float
    channel_map: Tensor | None

    @property
    def holds(self) -> bool:
        """True if the mapping is valid."""
        return self.channel_map is not None and self.difference <= self.tolerance

    @property
    def untested(self) -> bool:
        """True if the call says nothing of the mapping."""
        return math.isnan(self.difference)


@dataclass(frozen=True)
class Claim:
    """A mapping that is to be proven.

    Attributes:
        smooth: the layer whose output channels are divided by s.
        balance: the layers whose input channels are multiplied by s.
        channel_map: which output channel of ``smooth`` feeds each input of ``balance``, as far as is known.
    """

    smooth: nn.Module
    balance: Sequence[nn.Module]
    channel_map: Tensor | None = None


def prove(block: Block, claim: Claim, seed: int = 0) -> Proof:
    """Try a mapping on the block's first call of the dry run; the block is left as it was.

    Where its channel map is not known, the likely ones are tried.
    """
    widths = {in_features(layer) for layer in claim.balance}
    channels = out_channels(claim.smooth)
    if len(widths) != 1 or channels is None:
        return Proof(math.inf, 0.0, None)
    before = _output(block)
    tolerance = _tolerance(before)
    best = Proof(math.inf, tolerance, None)
    known = [] if claim.channel_map is None else [claim.channel_map]
    for channel_map in itertools.chain(known, channel_maps(channels, widths.pop())):
        tried = Claim(claim.smooth, claim.balance, channel_map)
        difference = _difference(block, before, [tried], seed)
        if math.isnan(difference):
            return Proof(difference, tolerance, None)
        if difference <= best.difference:
            best = Proof(difference, tolerance, channel_map)
        if best.holds:
            break
    return best


def prove_together(block: Block, claims: Sequence[Claim], seed: int = 0) -> Proof:
    """Try mappings with known channel maps all at once: if that holds, each of them does.

    An output that does not move at all is taken for proof: each mapping held on a block of this kind, one by one, and
    had a share in its output.
    """
    before = _output(block)
    moved = _moved(block, before, claims, seed, compensate=True)
    difference = _difference(block, before, claims, seed) if moved else 0.0
    return Proof(difference, _tolerance(before), claims[0].channel_map)


def channel_maps(channels: int, width: int) -> Iterator[Tensor]:
    """The ways in which a producer's ``channels`` may feed a consumer's ``width`` inputs, the likeliest first.

    One to one; one part of a fused projection (the last: v of q, k, v, or up of gate, up; or the first); key/value
    channels that query heads share, of a projection of their own or the last part of a fused one; a part of each head
    of an interleaved fused projection.
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
        yield from _grouped_interleaved(channels, width)


def _repeated(part: int, width: int, head: int) -> Tensor:
    """Each head of ``head`` channels feeds width / part heads that follow one another."""
    index = torch.arange(width)
    return index // (head * (width // part)) * head + index % head


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


def _output(block: Block) -> list[Tensor]:
    leaves = tree_leaves(block.calls[0].of(block.module))
    return [t.clone() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _tolerance(output: Sequence[Tensor]) -> float:
    return max(1e-4, 8 * max((torch.finfo(t.dtype).eps for t in output), default=0.0))


def _difference(block: Block, before: Sequence[Tensor], claims: Sequence[Claim], seed: int) -> float:
    """How far the output moves with the scales moved over, relative to how far it moves with nothing to make up."""
    moved = _moved(block, before, claims, seed, compensate=True)
    alone = _moved(block, before, claims, seed, compensate=False)
    if not moved and not alone:
        return math.nan
    return moved / alone if alone and math.isfinite(moved) else math.inf


@torch.no_grad()
def _moved(block: Block, before: Sequence[Tensor], claims: Sequence[Claim], seed: int, *, compensate: bool) -> float:
    """The norm of the change of the block's output."""
    generator = torch.Generator().manual_seed(seed)
    with restored([module for claim in claims for module in (claim.smooth, *claim.balance)]):
        for claim in claims:
            _scale(claim, generator, compensate=compensate)
        after = _output(block)
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(after, before, strict=True))
    return math.sqrt(squares) if math.isfinite(squares) else math.inf


def _scale(claim: Claim, generator: torch.Generator, *, compensate: bool) -> None:
    """Multiply the balance layers' inputs by random powers of two and, to compensate, divide the producer's outputs."""
    assert claim.channel_map is not None  # noqa: S101
    channels = out_channels(claim.smooth) or 0
    device = next(claim.smooth.parameters()).device
    powers = torch.tensor([1 / 16, 1 / 8, 1 / 4, 1 / 2])[torch.randint(0, 4, (channels,), generator=generator)]
    for layer in claim.balance:
        multiply_inputs(layer, powers[claim.channel_map].to(device))
    if compensate:
        feeding = torch.zeros(channels, dtype=torch.bool)
        feeding[claim.channel_map] = True
        divide_outputs(claim.smooth, torch.where(feeding, powers, 1.0).to(device))


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever happens to the parameters inside the ``with`` is undone after it."""
    parameters = {id(p): p for module in modules for p in module.parameters()}
    saved: Mapping[int, Tensor] = {key: p.data.clone() for key, p in parameters.items()}
    try:
        yield
    finally:
        for key, p in parameters.items():
            p.data.copy_(saved[key])
