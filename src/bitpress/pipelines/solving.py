"""What all pipelines share: collecting for a block, solving it, saying how far things are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bitpress.models.blocks import Block
from bitpress.models.linears import in_features
from bitpress.modifiers import Modifier, State
from bitpress.pipelines.experts import share_among_experts
from bitpress.statistics import InputCollector, InputStatistics, Statistic


@dataclass(frozen=True)
class Progress:
    """How far the pipeline is.

    Attributes:
        done: blocks that are finished.
        total: blocks in all.
        block: the current block, for people.
        phase: "measure", "calibrate", "solve" or "propagate".
    """

    done: int
    total: int
    block: str
    phase: str


OnProgress = Callable[[Progress], None]


def make_collector(state: State, modifiers: Sequence[Modifier], layers: Mapping[str, nn.Module]) -> InputCollector:
    """A collector of what any of the modifiers asks for."""
    wanted = dict.fromkeys(layers, Statistic.NONE)
    for modifier in modifiers:
        for name in layers:
            wanted[name] |= modifier.required_statistics(state, name)
    return InputCollector(layers, {name: in_features(layer) for name, layer in layers.items()}, wanted)


def solve(state: State, modifiers: Sequence[Modifier], block: Block, statistics: dict[str, InputStatistics]) -> None:
    """Let every modifier, in recipe order, solve the block."""
    state.statistics, few = share_among_experts(block, statistics, state.min_expert_tokens)
    state.few_tokens |= few
    state.ranges = {}
    for modifier in modifiers:
        modifier.on_block(state, block)
