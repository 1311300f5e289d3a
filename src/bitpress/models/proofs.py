"""Proof that a mapping leaves the model's function as it was, by running the block with and without it.

Random scales are powers of two: multiplying by them rounds nothing, in any float dtype, so that a block with a valid
mapping gives the same output almost to the bit, and one with an invalid mapping plainly does not. They are below 1:
what runs between the layers is driven by values up to 16 times as large, where no activation function is still almost
linear (near 0 SiLU and GELU are, and would pass in bfloat16).

What the block gives without any scale, and with scales that nothing makes up for, is measured once for all claims.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.channels import channel_maps
from bitpress.models.experts import ExpertLinear
from bitpress.models.linears import has_columns, in_features, is_linear
from bitpress.models.smoothing import divide_outputs, multiply_inputs, out_channels
from bitpress.models.steadiness import first_unsteady

# Two channels draw the same of four scales one time in four: of few channels a map that mixes them up may pass by
# chance, so that it is tried with further draws.
FEW_CHANNELS = 16
FURTHER_DRAWS = 7


class UnsteadyError(BitpressError):
    """A block whose output changes from run to run: nothing can be proven in it."""


@dataclass(frozen=True)
class Proof:
    """What came of trying a mapping.

    Attributes:
        difference: how much the block's output moved with the scale moved over, relative to how much it moves when the
            balance layers are scaled and nothing makes up for it. 0 is perfect, about 1 is plain wrong; NaN if the
            balance layers have no share in the output, as an expert that sees no token.
        tolerance: the greatest difference that rounding explains.
        channel_map: (in,), int64: which output channel of the smooth layer feeds each input of the balance layers.
        power: what becomes of a scale of the smooth layer's output on its way: its first power, or behind a squared
            ReLU its second.
    """

    difference: float
    tolerance: float
    channel_map: Tensor | None
    power: int = 1

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
        balance: the layers whose input channels are multiplied by s ** power.
        channel_map: which output channel of ``smooth`` feeds each input of ``balance``, as far as is known.
        power: see :attr:`Proof.power`.
    """

    smooth: nn.Module
    balance: Sequence[nn.Module]
    channel_map: Tensor | None = None
    power: int = 1


def prove(block: Block, claim: Claim, seed: int = 0) -> Proof:
    """See :meth:`Prover.prove`."""
    return Prover(block, seed).prove(claim)


def prove_together(block: Block, claims: Sequence[Claim], seed: int = 0) -> Proof:
    """See :meth:`Prover.prove_together`."""
    return Prover(block, seed).prove_together(claims)


class Prover:
    """Tries mappings on a block's first call of the dry run; the block is left as it was.

    Args:
        block: the block, with that call.
        seed: of the random scales.
        by_calls: scale linear layers where they are called, which costs less than to write to their weights.

    Raises:
        UnsteadyError: the block's output changes from run to run.
    """

    def __init__(self, block: Block, seed: int = 0, *, by_calls: bool = True) -> None:
        self.block, self.seed, self._by_calls = block, seed, by_calls
        known = block.first_output
        self._before = _output(block) if known is None else _floats(known)
        self._steady = False
        self._alone: dict[tuple[Any, ...], float] = {}
        self.tolerance = max(1e-4, 8 * max((torch.finfo(t.dtype).eps for t in self._before), default=0.0))

    def prove(self, claim: Claim) -> Proof:
        """Try one mapping. Where its channel map is not known, the likely ones are tried."""
        widths = {in_features(layer) for layer in claim.balance}
        channels = out_channels(claim.smooth)
        if len(widths) != 1 or channels is None:
            return Proof(math.inf, 0.0, None)
        width = widths.pop()
        best = Proof(math.inf, self.tolerance, None)
        hopeless: dict[tuple[bytes, int], bool] = {}
        for channel_map, power in _variants(claim, channels, width):
            feeding = channel_map.unique().numpy().tobytes(), power
            if hopeless.get(feeding):
                continue
            tried = Claim(claim.smooth, claim.balance, channel_map, power)
            difference = self._difference([tried])
            if math.isnan(difference):
                return Proof(difference, self.tolerance, None)
            if difference <= self.tolerance and channels < FEW_CHANNELS:
                difference = max(difference, self._with_other_scales(tried))
            if difference <= best.difference:
                best = Proof(difference, self.tolerance, channel_map, power)
            if best.holds:
                break
            if feeding not in hopeless:
                hopeless[feeding] = channels < width and not self._passes_one_scale(tried)
        return best

    def _passes_one_scale(self, claim: Claim) -> bool:
        """True if one scale for all channels passes: if not, no other map of the same channels can."""
        moved = self._moved([claim], compensate=True, alike=True)
        return self._relative(moved, [claim]) <= self.tolerance

    def prove_together(self, claims: Sequence[Claim]) -> Proof:
        """Try mappings whose channel maps are known, all at once, as they will be used.

        That layers which have no share in the output pass is for a block of a kind in which each mapping, tried alone,
        had a share in its output.
        """
        moved = self._moved(claims, compensate=True)
        difference = self._relative(moved, claims) if moved else 0.0
        return Proof(difference, self.tolerance, claims[0].channel_map)

    def hold_as_applied(self, claims: Sequence[Claim]) -> bool:
        """True if mappings hold when they are written to the weights, whoever else may read those."""
        return not claims or Prover(self.block, self.seed, by_calls=False).prove_together(claims).holds

    def _difference(self, claims: Sequence[Claim]) -> float:
        """How far the output moves with the scales moved over, relative to how far with nothing to make up for them."""
        return self._relative(self._moved(claims, compensate=True), claims)

    def _relative(self, moved: float, claims: Sequence[Claim]) -> float:
        alone = self._moved_alone(claims)
        if not moved and not alone:
            return math.nan
        difference = moved / alone if alone and math.isfinite(moved) else math.inf
        if difference > self.tolerance:
            self._check_steady()
        return difference

    def _with_other_scales(self, claim: Claim) -> float:
        """The greatest difference with other draws: few channels may have drawn the same scale where a map mixes up."""
        seeds = range(self.seed + 1, self.seed + 1 + FURTHER_DRAWS)
        return max(Prover(self.block, seed)._difference([claim]) for seed in seeds)

    def _moved_alone(self, claims: Sequence[Claim]) -> float:
        """How far the output moves when only the inputs are scaled: once for all producers that are tried."""
        key = tuple((id(layer), c.power) for c in claims for layer in c.balance)
        if key not in self._alone:
            self._alone[key] = self._moved(claims, compensate=False)
        return self._alone[key]

    @torch.no_grad()
    def _moved(self, claims: Sequence[Claim], *, compensate: bool, alike: bool = False) -> float:
        """The norm of the change of the block's output."""
        for by_calls in (True, False) if self._by_calls else (False,):
            with _Scaled(claims, self.seed, compensate=compensate, alike=alike, by_calls=by_calls) as scaled:
                after = _output(self.block)
            if not scaled.silent:
                break
        return _distance(after, self._before)

    def _check_steady(self) -> None:
        """Before a mapping is blamed: the block by itself must give the same output again."""
        if self._steady:
            return
        self._steady = True
        again = _distance(_output(self.block), self._before)
        if again > self.tolerance * _norm(self._before):
            culprit = first_unsteady(self.block)
            source = f"{culprit[0]} ({type(culprit[1]).__name__})" if culprit else "it"
            raise UnsteadyError(
                f"the output of {self.block.label} changes from run to run, so that no mapping can be proven in it: "
                f"{source} draws random numbers, or remembers its last run. Turn that off, or use "
                "QuantizationModifier alone."
            )


def _variants(claim: Claim, channels: int, width: int) -> Iterator[tuple[Tensor, int]]:
    """Channel maps and powers to try. A squared ReLU joins channels one to one."""
    if claim.channel_map is not None:
        yield claim.channel_map, claim.power
    for channel_map in channel_maps(channels, width):
        yield channel_map, 1
    if channels == width and has_columns(claim.smooth):
        yield torch.arange(width), 2


def _output(block: Block) -> list[Tensor]:
    return [t.clone() for t in _floats(block.calls[0].copy().of(block.module))]


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _distance(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    # What is the same has not moved, be it infinite, as in a mask that is handed on.
    squares = sum(
        float((a.double() - b.double()).masked_fill(a == b, 0.0).square().sum())
        for a, b in zip(after, before, strict=True)
    )
    return math.sqrt(squares) if math.isfinite(squares) else math.inf


def _norm(output: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in output))


class _Scaled:
    """Inside the ``with`` balance layers' inputs are multiplied by random powers of two.

    If it is to ``compensate``, the producers' outputs are divided by them. A linear layer is scaled by hooks where it
    is called, which is exact and writes to no weight; all others, and with ``by_calls=False`` these too, by their
    weights. ``alike`` takes one power for all channels.

    Attributes:
        silent: True if a layer with a hook was not called: the model's code uses its weight by itself.
    """

    def __init__(self, claims: Sequence[Claim], seed: int, *, compensate: bool, alike: bool, by_calls: bool) -> None:
        self._claims, self._compensate, self._alike, self._by_calls = claims, compensate, alike, by_calls
        self._generator = torch.Generator().manual_seed(seed)
        self._undo = ExitStack()
        self._waiting: set[int] = set()

    @property
    def silent(self) -> bool:
        return bool(self._waiting)

    def __enter__(self) -> "_Scaled":
        every = [m for claim in self._claims for m in (claim.smooth, *claim.balance)]
        with ExitStack() as stack:
            stack.enter_context(restored([m for m in every if not self._is_called(m)]))
            for claim in self._claims:
                self._scale(claim, stack)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _is_called(self, layer: nn.Module) -> bool:
        return self._by_calls and is_linear(layer) and not isinstance(layer, ExpertLinear)

    def _scale(self, claim: Claim, stack: ExitStack) -> None:
        assert claim.channel_map is not None  # noqa: S101
        channels = out_channels(claim.smooth) or 0
        device = next(claim.smooth.parameters()).device
        powers = torch.tensor([1 / 16, 1 / 8, 1 / 4, 1 / 2])[
            torch.randint(0, 4, (channels,), generator=self._generator)
        ]
        if self._alike:
            powers.fill_(1 / 16)
        inputs = powers[claim.channel_map].pow(claim.power).to(device)
        for layer in claim.balance:
            if self._is_called(layer):
                self._hook(stack, layer, layer.register_forward_pre_hook(partial(self._at_input, inputs)))
            else:
                multiply_inputs(layer, inputs)
        if not self._compensate:
            return
        feeding = torch.zeros(channels, dtype=torch.bool)
        feeding[claim.channel_map] = True
        outputs = torch.where(feeding, powers, 1.0).to(device)
        if self._is_called(claim.smooth):
            self._hook(stack, claim.smooth, claim.smooth.register_forward_hook(partial(self._at_output, outputs)))
        else:
            divide_outputs(claim.smooth, outputs)

    def _hook(self, stack: ExitStack, layer: nn.Module, handle: Any) -> None:
        stack.callback(handle.remove)
        self._waiting.add(id(layer))

    # A layer that is called in another way than usual is scaled by its weight, then.

    def _at_input(self, powers: Tensor, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[-1:] != powers.shape:
            return None
        self._waiting.discard(id(layer))
        return args[0] * powers.to(args[0].dtype), *args[1:]

    def _at_output(self, powers: Tensor, layer: nn.Module, _: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or output.shape[-1:] != powers.shape:
            return None
        self._waiting.discard(id(layer))
        return output / powers.to(output.dtype)


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
