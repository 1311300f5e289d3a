"""The mappings of a model, block by block: the user's, the registry's or discovered, and each one proven."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressed_tensors.utils import is_match
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.discovery import Left, discover, structure
from bitpress.models.experts import ExpertLinear
from bitpress.models.proofs import Claim, Proof, Prover
from bitpress.modifiers.mappings import AWQMapping, ResolvedMapping, registered_mappings, resolve_mapping, why_excluded

Considers = Callable[[str, nn.Module, Block], bool]
# A block of a kind, its mappings, and its layers without one.
_Kind = tuple[str, list[ResolvedMapping], list[Left]]


@dataclass
class Resolution:
    """What holds in each block.

    Attributes:
        mappings: by the block's name.
        left: the targeted layers without a mapping, by the block's name.
        kinds: a number for each kind of block, by the block's name.
    """

    mappings: dict[str, list[ResolvedMapping]]
    left: dict[str, list[Left]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)


def resolve_mappings(
    model: nn.Module,
    blocks: Sequence[Block],
    considers: Considers = lambda name, _, block: name in block.layers,
    stated: Sequence[AWQMapping] | None = None,
    seed: int = 0,
) -> Resolution:
    """The mappings that a user has ``stated``, or the registry has for the model's family, or that running finds.

    Args:
        model: the model.
        blocks: its blocks, with their calls of the dry run.
        considers: says of a layer of a block, by name, whether it is to be balanced.
        stated: the user's; None to look further.
        seed: of the random scales of the proofs.

    Raises:
        BitpressError: a stated or registered mapping that fits no block, joins blocks, shares its smooth layer with
            another, or does not hold; the difference is measured.
    """
    registered = registered_mappings(model) if stated is None else None
    table = stated if stated is not None else registered
    if table is None:
        found = _without_excluded(model, _discovered(blocks, considers, seed))
        for name, mapping, why in list(_breaking_others(found, blocks, seed)):
            found.mappings[name].remove(mapping)
            found.left[name] = [*found.left[name], Left(tuple(mapping.balance), why)]
        return found
    source = "user" if stated is not None else "registry"
    resolution = Resolution({b.name: _in_block(table, b, considers, source) for b in blocks}, kinds=_kinds(blocks))
    if stated is not None:
        _check_all_used(stated, resolution, blocks)
    _prove(resolution, blocks, seed)
    for name, mapping, why in _breaking_others(resolution, blocks, seed):
        raise BitpressError(
            f"{mapping.mapping} ({source}) does not hold for the model, though it does in {name}: {why}."
        )
    for block in blocks:
        stated_for = {name for mapping in resolution.mappings[block.name] for name in mapping.balance}
        missing = tuple(name for name in block.layers if name not in stated_for)
        resolution.left[block.name] = [Left(missing, f"no mapping of the {source} names it")] if missing else []
    return resolution


def _in_block(table: Sequence[AWQMapping], block: Block, considers: Considers, source: str) -> list[ResolvedMapping]:
    found = [resolved for mapping in table for resolved in resolve_mapping(mapping, block, source)]
    found = [m for m in found if any(considers(n, layer, block) for n, layer in m.balance.items())]
    first: dict[str, ResolvedMapping] = {}
    for mapping in found:
        other = first.setdefault(mapping.smooth_name, mapping)
        if other is not mapping:
            raise BitpressError(
                f"{mapping.smooth_name} is the smooth layer of two mappings, {other.mapping} and {mapping.mapping}: a "
                "layer absorbs one scale. Join their balance layers in one mapping."
            )
    return found


def _discovered(blocks: Sequence[Block], considers: Considers, seed: int) -> Resolution:
    """Mappings found by running each kind of block once; its other blocks have them proven only."""
    resolution = Resolution({block.name: [] for block in blocks}, kinds=_kinds(blocks))
    resolution.left = {b.name: [Left(tuple(b.layers), "its block did not run in the dry run")] for b in blocks}
    known: dict[int, _Kind] = {}
    for block in blocks:
        if block.calls:
            with block.present():
                mappings, left = _discover_in(block, known, resolution.kinds[block.name], seed)
            resolution.left[block.name] = left
            resolution.mappings[block.name] = [
                m for m in mappings if any(considers(n, layer, block) for n, layer in m.balance.items())
            ]
    return resolution


def _discover_in(
    block: Block, known: dict[int, _Kind], kind: int, seed: int
) -> tuple[list[ResolvedMapping], list[Left]]:
    """A block's mappings, and the layers without one: those that a block of its kind has, if they hold in it."""
    source, of_kind, left = known.get(kind, ("", [], []))
    modules = dict(block.named_modules())
    mappings = [mapping.moved(source, block, modules) for mapping in of_kind]
    claims = [m.claim() for m in mappings]
    if kind in known:
        left = [Left(tuple(block.name + n.removeprefix(source) for n in x.layers), x.why) for x in left]
    if kind not in known or (claims and not Prover(block, seed).prove_together(claims).holds):
        findings = discover(block, seed)
        mappings, left = [ResolvedMapping.discovered(f, modules) for f in findings.found], findings.left
        known[kind] = (block.name, mappings, left)
    return mappings, left


def _breaking_others(
    resolution: Resolution, blocks: Sequence[Block], seed: int
) -> Iterator[tuple[str, ResolvedMapping, str]]:
    """Mappings that do not hold for the model, though in their block: other blocks use some of their weights, too."""
    users: dict[int, list[Block]] = {}
    for block in blocks:
        for parameter in block.module.parameters():
            users.setdefault(id(parameter), []).append(block)
    for name, mappings in resolution.mappings.items():
        for mapping in mappings:
            using = [users.get(id(_weight(m)), []) for m in (mapping.smooth, *mapping.balance.values())]
            others = {b.name: b for of_layer in using for b in of_layer if b.name != name}
            for other in others.values():
                in_part = not all(any(b is other for b in of_layer) for of_layer in using)
                if in_part or (other.calls and not _holds_in(other, mapping, seed)):
                    yield name, mapping, f"some of these weights are {other.label}'s, too, which the scale would change"
                    break


def _holds_in(block: Block, mapping: ResolvedMapping, seed: int) -> bool:
    with block.present():
        return Prover(block, seed).prove_together([mapping.claim()]).holds


def _weight(layer: nn.Module) -> nn.Parameter | None:
    """The parameter that holds a layer's weight."""
    if isinstance(layer, ExpertLinear):
        return layer.experts.module.get_parameter(layer.projection.parameter)
    return layer._parameters.get("weight")


def _without_excluded(model: nn.Module, resolution: Resolution) -> Resolution:
    for name, found in resolution.mappings.items():
        reasons = {id(mapping): why_excluded(model, mapping) for mapping in found}
        for mapping in found:
            why = reasons[id(mapping)]
            if why is not None:
                resolution.left[name] = [*resolution.left[name], Left(tuple(mapping.balance), why)]
        resolution.mappings[name] = [mapping for mapping in found if reasons[id(mapping)] is None]
    return resolution


def _kinds(blocks: Sequence[Block]) -> dict[str, int]:
    numbers: dict[Any, int] = {}
    return {block.name: numbers.setdefault(_kind(block), len(numbers)) for block in blocks}


def _kind(block: Block) -> tuple[Any, ...]:
    """Equal for blocks of one structure in which the same layers are targeted: for others no mapping is looked for."""
    return structure(block), frozenset(name.removeprefix(block.name) for name in block.layers)


def _prove(resolution: Resolution, blocks: Sequence[Block], seed: int) -> None:
    """Every mapping on every block that ran; where one fails, nothing has been changed yet."""
    maps: dict[Any, tuple[Tensor, int]] = {}
    for block in blocks:
        mappings = resolution.mappings[block.name]
        if block.calls and mappings:
            with block.present():
                _prove_block(mappings, block, maps, Prover(block, seed))


def _prove_block(
    mappings: Sequence[ResolvedMapping], block: Block, maps: dict[Any, tuple[Tensor, int]], prover: Prover
) -> None:
    """``maps`` are the channel maps of kinds that have been proven alone: all of these at once is enough."""
    known, fresh = [], []
    for mapping in mappings:
        if mapping.kind(block) in maps:
            mapping.channel_map, mapping.power = maps[mapping.kind(block)]
            known.append(mapping)
            continue
        _prove_alone(mapping, block, prover)
        if mapping.channel_map is not None:
            maps[mapping.kind(block)] = mapping.channel_map, mapping.power
            fresh.append(mapping)
    if not prover.hold_as_applied([m.claim() for m in fresh]):
        for mapping in fresh:
            _prove_alone(mapping, block, Prover(block, prover.seed, by_calls=False))
    together = prover.prove_together([m.claim() for m in known]) if known else None
    for mapping in known:
        if together is not None and together.holds:
            mapping.difference = together.difference
        else:
            mapping.channel_map = None
            _prove_alone(mapping, block, prover)


def _prove_alone(mapping: ResolvedMapping, block: Block, prover: Prover) -> None:
    proof = prover.prove(Claim(mapping.smooth, list(mapping.balance.values())))
    if proof.untested:
        return
    if not proof.holds:
        raise BitpressError(_refutation(mapping, block, proof))
    mapping.channel_map, mapping.difference, mapping.power = proof.channel_map, proof.difference, proof.power


def _check_all_used(stated: Sequence[AWQMapping], resolution: Resolution, blocks: Sequence[Block]) -> None:
    used = {str(m.mapping) for found in resolution.mappings.values() for m in found}
    for mapping in stated:
        if str(mapping) in used:
            continue
        smooth, balance = (
            [b.label for b in blocks if any(is_match(n, m, list(patterns)) for n, m in b.named_modules())]
            for patterns in ([mapping.smooth_layer], mapping.balance_layers)
        )
        if smooth and balance and not set(smooth) & set(balance):
            raise BitpressError(
                f"{mapping} joins layers of different blocks: its smooth layer is in {smooth[0]}, its balance layers "
                f"in {balance[0]}. A mapping stays within a block; state larger blocks with sequential_targets."
            )
        raise BitpressError(
            f"{mapping} fits no block: its smooth layer and its quantized balance layers must be in one block, "
            "and the smooth layer must be a norm or a linear layer."
        )


def _refutation(mapping: ResolvedMapping, block: Block, proof: Proof) -> str:
    return (
        f"{mapping.mapping} ({mapping.source}) is not valid in {block.label}: with random scales moved from "
        f"{', '.join(mapping.balance)} to {mapping.smooth_name} the block's output moves by {proof.difference:.2g} of "
        f"what the scales alone do (rounding explains {proof.tolerance:.2g}). Remove or correct the mapping."
    )
