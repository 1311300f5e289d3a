"""Finding mappings by running a block: which layers share an input, and which one before them absorbs its scale."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.experts import ExpertLinear
from bitpress.models.linears import has_columns, in_features
from bitpress.models.proofs import Claim, Proof, Prover, UnsteadyError
from bitpress.models.smoothing import out_channels
from bitpress.statistics.collector import identify


@dataclass(frozen=True)
class Discovery:
    """A mapping that was found, and proven.

    Attributes:
        smooth: name of the layer that absorbs the scale.
        balance: names of all layers that receive the scaled tensor, quantized or not.
        proof: what was measured.
    """

    smooth: str
    balance: tuple[str, ...]
    proof: Proof


@dataclass(frozen=True)
class Left:
    """Layers that share an input which nothing absorbs the scale of.

    Attributes:
        layers: their names.
        why: the reason, for people.
    """

    layers: tuple[str, ...]
    why: str


@dataclass
class Findings:
    """What there is in one block.

    Attributes:
        found: in the order in which their balance layers run.
        left: targeted layers without a mapping.
    """

    found: list[Discovery] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)


@dataclass
class _Group:
    """Layers that receive the same tensor, how many layers had run before, and the best that failed."""

    names: list[str]
    before: int
    failed: tuple[str, Proof] | None = None
    trouble: str = ""


def discover(block: Block, seed: int = 0) -> Findings:
    """All mappings of a block that hold, and the layers that have none.

    Layers that receive the same tensor are scaled together. Each norm, linear layer or convolution that ran before
    them, the latest first, is a candidate for absorbing the scale; the first that passes the proof does. A layer
    absorbs one scale only. Groups that find none are tried together: what a router gathers for its experts is the
    tensor that the router has seen, in another order. Experts are alike: what holds for one is proven for all at once.

    Args:
        block: with the call of the dry run that is tried.
        seed: of the random scales.

    Raises:
        UnsteadyError: the block's output changes from run to run.
    """
    if block.name in block.layers:
        return Findings(left=[Left((block.name,), "it is a block of its own: nothing runs before it there")])
    ran, groups, unsuitable = _watch(block)
    prover = Prover(block, seed)
    search = _find(block, ran, groups, prover)
    if not prover.hold_as_applied(search.claims):
        for group in groups:
            group.failed, group.trouble = None, ""
        search = _find(block, ran, groups, Prover(block, seed, by_calls=False))
    left = [Left(tuple(n for n in g.names if n in block.layers), _why(g)) for g in search.failed]
    left += [Left((name,), why) for name, why in unsuitable.items() if name in block.layers]
    return Findings(search.found, [each for each in left if each.layers])


def _find(block: Block, ran: dict[str, nn.Module], groups: Sequence["_Group"], prover: Prover) -> "_Search":
    """Search all groups: those of experts that are alike together, and those that found nothing joined."""
    search = _Search(block, ran, prover)
    alike: dict[tuple[Any, ...], list[_Group]] = {}
    lone: list[_Group] = []
    for group in groups:
        kind = _expert_kind(group.names, ran)
        if kind is None:
            lone.append(group)
        else:
            alike.setdefault(kind, []).append(group)
    failed = [g for g in lone if not search.one(g)]
    for experts in alike.values():
        failed += search.all_experts(experts)
    search.failed = search.joined(sorted(failed, key=lambda g: g.before))
    position = {name: i for i, group in enumerate(groups) for name in group.names}
    search.found.sort(key=lambda d: min(position[n] for n in d.balance))
    return search


class _Search:
    """The mappings of one block that have been found so far."""

    def __init__(self, block: Block, ran: dict[str, nn.Module], prover: Prover) -> None:
        self.block, self.ran, self.prover = block, ran, prover
        self.found: list[Discovery] = []
        self.failed: list[_Group] = []
        self.taken: set[str] = set()

    @property
    def claims(self) -> list[Claim]:
        """What was found, as claims."""
        return [
            Claim(self.ran[d.smooth], [self.ran[n] for n in d.balance], d.proof.channel_map, d.proof.power)
            for d in self.found
        ]

    def one(self, group: _Group) -> bool:
        """Find the mapping of one group; a group of no targeted layer needs none."""
        if not any(name in self.block.layers for name in group.names):
            return False
        balance = [self.ran[name] for name in group.names]
        for smooth in self._candidates(group):
            try:
                proof = self.prover.prove(Claim(self.ran[smooth], balance))
            except UnsteadyError:
                raise
            except BitpressError as error:
                group.trouble = str(error)
                continue
            if proof.holds:
                self._take(smooth, group.names, proof)
                return True
            if group.failed is None or proof.difference < group.failed[1].difference or proof.untested:
                group.failed = smooth, proof
            if proof.untested:
                break  # whatever comes before it, the output does not depend on these layers
        return False

    def all_experts(self, groups: Sequence[_Group]) -> list[_Group]:
        """Find the mappings of groups that are the same layers of different experts; those that have none."""
        model = next((g for g in groups if self.one(g)), None)
        if model is None:
            return list(groups)
        pattern = self.found[-1]
        rest = [g for g in groups if g is not model]
        smooths = [_of_expert(pattern.smooth, self.ran[model.names[0]], self.ran[g.names[0]]) for g in rest]
        claims = [
            Claim(self.ran[s], [self.ran[n] for n in g.names], pattern.proof.channel_map, pattern.proof.power)
            for s, g in zip(smooths, rest, strict=True)
        ]
        together = self.prover.prove_together(claims) if claims else pattern.proof
        if not together.holds:
            return [g for g in rest if not self.one(g)]
        for smooth, group in zip(smooths, rest, strict=True):
            proof = Proof(together.difference, together.tolerance, pattern.proof.channel_map, pattern.proof.power)
            self._take(smooth, group.names, proof)
        return []

    def joined(self, failed: Sequence[_Group]) -> list[_Group]:
        """Try groups that found nothing with all others of their width; those that still have none."""
        by_width: dict[int, list[_Group]] = {}
        for group in failed:
            by_width.setdefault(in_features(self.ran[group.names[0]]), []).append(group)
        return [group for groups in by_width.values() for group in self._joined_runs(groups)]

    def _joined_runs(self, groups: list[_Group]) -> list[_Group]:
        """Join as many neighbours as there is a mapping for."""
        for count in range(len(groups), 1, -1):
            for start in range(len(groups) - count + 1):
                run = groups[start : start + count]
                union = _Group([name for group in run for name in group.names], min(group.before for group in run))
                if self.one(union):
                    return self._joined_runs(groups[:start]) + self._joined_runs(groups[start + count :])
        return groups

    def _candidates(self, group: _Group) -> Iterator[str]:
        """Layers that ran before the group and have output channels, the latest first; an expert's are its own."""
        balanced = {layer.expert for layer in map(self.ran.get, group.names) if isinstance(layer, ExpertLinear)}
        for name in reversed(list(self.ran)[: group.before]):
            layer = self.ran[name]
            fits = not isinstance(layer, ExpertLinear) or balanced == {layer.expert}
            if fits and name not in group.names and name not in self.taken and out_channels(layer) is not None:
                yield name

    def _take(self, smooth: str, names: Iterable[str], proof: Proof) -> None:
        self.found.append(Discovery(smooth, tuple(names), proof))
        self.taken.add(smooth)


def structure(block: Block) -> tuple[Any, ...]:
    """Equal for blocks of one kind: the same modules, by name and class, with parameters of the same shapes."""
    return tuple(
        (
            name.removeprefix(block.name),
            type(module).__name__,
            *(tuple(p.shape) for p in module.parameters(recurse=False)),
        )
        for name, module in block.named_modules()
        if not isinstance(module, ExpertLinear)
    )


def _expert_kind(names: Sequence[str], ran: dict[str, nn.Module]) -> tuple[Any, ...] | None:
    """Equal for groups that are the same layers of different experts; None for any other."""
    layers = [ran[name] for name in names]
    owners = {(id(m.experts), m.expert) for m in layers if isinstance(m, ExpertLinear)}
    if len(owners) != 1 or not all(isinstance(m, ExpertLinear) for m in layers):
        return None
    parts = tuple(m.projection.part for m in layers if isinstance(m, ExpertLinear))
    return (owners.pop()[0], *parts)


def _of_expert(name: str, model: nn.Module, other: nn.Module) -> str:
    """The name of one expert's layer, for another expert; what is not an expert's keeps its name."""
    assert isinstance(model, ExpertLinear)  # noqa: S101
    assert isinstance(other, ExpertLinear)  # noqa: S101
    head, _, part = f"{name}.".rpartition(f".{model.expert}.")
    return f"{head}.{other.expert}.{part}".rstrip(".") if head else name


def _why(group: _Group) -> str:
    if group.failed is None:
        return group.trouble or "no norm, linear layer or convolution runs before it in its block"
    smooth, proof = group.failed
    more = f"; {group.trouble}" if group.trouble else ""
    if proof.untested:
        return "it has no share in the block's output in the dry run"
    if not math.isfinite(proof.difference):
        return f"no layer before it has output channels that fit its inputs (the nearest is {smooth}){more}"
    return (
        f"nothing before it absorbs its scale: with the best, {smooth}, the block's output moves by "
        f"{proof.difference:.2g} of what the scale alone does{more}"
    )


@torch.no_grad()
def _watch(block: Block) -> tuple[dict[str, nn.Module], list[_Group], dict[str, str]]:
    """The layers in the order in which they first ran, those with columns grouped by the tensor they received.

    Layers that ran more than once, or never, are left out, with the reason: one scale could not be moved for all calls.
    """
    order: dict[str, nn.Module] = {}
    runs: dict[str, int] = {}
    inputs: dict[tuple[Any, ...], tuple[int, list[str]]] = {}
    held: list[Any] = []  # an identity is not given to another tensor while it is referred to

    def watch(name: str, layer: nn.Module) -> Any:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            runs[name] = runs.get(name, 0) + 1
            x = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
            if x is not None and has_columns(layer) and x.shape[-1:] == (in_features(layer),):
                key, reference = identify(x)
                held.append(reference)
                inputs.setdefault(key, (len(order), []))[1].append(name)
            order.setdefault(name, layer)

        return observe

    layers = {n: m for n, m in block.named_modules() if n != block.name and (out_channels(m) or has_columns(m))}
    handles = [m.register_forward_pre_hook(watch(n, m), with_kwargs=True) for n, m in layers.items()]
    try:
        block.calls[0].copy().of(block.module)
    finally:
        for handle in handles:
            handle.remove()
    once = {name: layer for name, layer in order.items() if runs[name] == 1}
    position = {name: index for index, name in enumerate(once)}
    groups = [[n for n in names if n in once] for _, names in inputs.values()]
    unsuitable = {
        name: "it did not run in the dry run" if not runs.get(name) else f"it runs {runs[name]} times in its block"
        for name in layers
        if runs.get(name) != 1
    }
    found = [_Group(names, min(position[n] for n in names)) for names in groups if names]
    return once, sorted(found, key=lambda group: group.before), unsuitable
