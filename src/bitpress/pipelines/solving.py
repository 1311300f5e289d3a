"""What all pipelines share: collecting for a block, solving it, saying how far things are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitpress.models.blocks import Block
from bitpress.models.devices import device_of
from bitpress.models.linears import in_features
from bitpress.models.taps import Tap
from bitpress.modifiers import Modifier, State
from bitpress.modifiers.steps import NEAREST, note_inputs, note_rounding
from bitpress.pipelines.experts import share_among_experts
from bitpress.statistics import InputCollector, InputStatistics, Statistic, merge_all

HELD_OUT_OF = 8


@dataclass(frozen=True)
class Progress:
    """How far the pipeline is.

    Attributes:
        done: blocks that are finished, or others that ``unit`` names.
        total: of them in all.
        block: the current block, for people.
        phase: "measure", "calibrate", "solve", "learn", "propagate", "write", "distill", or the name of the
            modifier that solves.
        unit: what is counted: "blocks"; "tensors" where no block is looked at; before and after the blocks "draws",
            "batches" or "steps".
    """

    done: int
    total: int
    block: str
    phase: str
    unit: str = "blocks"


OnProgress = Callable[[Progress], None]


def phases_of(block: Block, done: int, total: int, on_progress: OnProgress) -> Callable[[str], None]:
    """What to call with each phase of a block, before which ``done`` of ``total`` are finished."""
    return lambda phase: on_progress(Progress(done, total, block.label, phase))


def make_collector(
    state: State, modifiers: Sequence[Modifier], layers: Mapping[str, nn.Module], *, ranges: bool = False
) -> InputCollector:
    """A collector of what any of the modifiers asks for; of ``ranges`` only where these are wanted too."""
    wanted = dict.fromkeys(layers, Statistic.NONE)
    for modifier in modifiers:
        for name in layers:
            wanted[name] |= modifier.required_statistics(state, name)
    if not ranges:
        wanted = {name: each & ~Statistic.RANGE for name, each in wanted.items()}
    return InputCollector(layers, {name: _columns(layer) for name, layer in layers.items()}, wanted)


def make_range_collector(state: State, modifiers: Sequence[Modifier], blocks: Sequence[Block]) -> InputCollector:
    """A collector of the ranges alone: they are those of blocks whose weights are new.

    Such a block is run anyway, for the next one's inputs. Nothing then has to follow what smoothing did to the
    channels, and the range is that of the model that ships.
    """
    layers = {name: layer for block in blocks for name, layer in watched(state, block).items()}
    asked = {n: [m.required_statistics(state, n) & Statistic.RANGE for m in modifiers] for n in layers}
    wanted = {name: Statistic.RANGE if any(each) else Statistic.NONE for name, each in asked.items()}
    return InputCollector(layers, {name: _columns(layer) for name, layer in layers.items()}, wanted)


def is_held_out(index: int, batches: int) -> bool:
    """True for the batches that judge what is fitted to the others: one in eight, at least one, but never all."""
    return index % HELD_OUT_OF == HELD_OUT_OF - 1 or (1 < batches < HELD_OUT_OF and index == batches - 1)


def watched(state: State, block: Block) -> dict[str, nn.Module]:
    """The layers of a block, and its taps."""
    return {**block.layers, **{name: tap for name, tap in state.taps.items() if block.holds(name)}}


def _columns(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, Tap) else in_features(layer)


def finish(
    state: State,
    modifiers: Sequence[Modifier],
    block: Block,
    ranges: dict[str, InputStatistics],
    before: Mapping[str, InputStatistics],
) -> None:
    """Tell every modifier that the block is solved.

    Args:
        state: the state.
        modifiers: the recipe's.
        block: the block.
        ranges: of the block with its new weights.
        before: of its earlier calls, if it is called more than once per forward.
    """
    wanted = (m.required_statistics(state, name) & Statistic.RANGE for m in modifiers for name in watched(state, block))
    if any(wanted):
        _merge_over_ranks(state, block, ranges)
    for name, statistics in ranges.items():
        if name in before and Statistic.RANGE in before[name].wanted:
            statistics.widen(before[name])
    state.statistics, _ = share_among_experts(block, ranges, state.min_expert_tokens)
    for modifier in modifiers:
        modifier.on_solved(state, block)


def solve(
    state: State,
    modifiers: Sequence[Modifier],
    block: Block,
    statistics: dict[str, InputStatistics],
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Let every modifier, in recipe order, solve the block, from what all ranks have seen.

    Args:
        state: the state.
        modifiers: the recipe's.
        block: the block.
        statistics: of its layers.
        say: called with the name of each modifier before its turn.
    """
    _merge_over_ranks(state, block, statistics)
    state.statistics, few = share_among_experts(block, statistics, state.min_expert_tokens)
    state.few_tokens |= few
    state.ranges, state.global_scales, state.output_energies = {}, {}, {}
    note_inputs(state, block)
    note_rounding(state, block, NEAREST)
    for modifier in modifiers:
        say(type(modifier).__name__.removesuffix("Modifier"))
        modifier.on_block(state, block)
        if type(modifier).on_block is not Modifier.on_block:
            note_rounding(state, block, type(modifier).__name__)


def make_notes(state: State, block: Block, first: int) -> dict[str, Any]:
    """What the report will say of a solved block; its mappings are those from ``first`` on. JSON can hold it."""
    return {
        "layers": {name: state.layer_records[name] for name in block.layers if name in state.layer_records},
        "mappings": state.mapping_records[first:],
        "few_tokens": {name: state.few_tokens[name] for name in block.layers if name in state.few_tokens},
        "block": state.block_records.get(block.name, {}),
    }


def take_notes(state: State, block: Block, notes: Mapping[str, Any]) -> None:
    """Take over what an earlier run has noted of a block."""
    state.layer_records |= notes["layers"]
    state.mapping_records += notes["mappings"]
    state.few_tokens |= notes["few_tokens"]
    if notes.get("block"):
        state.block_records[block.name] = notes["block"]


def _merge_over_ranks(state: State, block: Block, statistics: dict[str, InputStatistics]) -> None:
    # A tap has no parameters: its device is the model's.
    merge_all(statistics, state.ranks, lambda name: device_of(watched(state, block)[name], state.model))
