"""What a compression will need, before it begins: memory by what takes it, and disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitpress.errors import BitpressError
from bitpress.memory import free_memory, process_memory
from bitpress.models.blocks import Block
from bitpress.models.experts import ExpertLinear
from bitpress.models.linears import weight_matrix
from bitpress.modifiers import Modifier, State
from bitpress.statistics import Statistic

SQUARE = (Statistic.GRAM, Statistic.HELD_OUT, Statistic.DRIFT)
# Working copies of a layer's weight in float32, and of its Gram matrix, while it is solved.
WEIGHT_COPIES, GRAM_COPIES = 4, 2
# Bytes for each weight of a block that is learned: what it was, where it is, two copies of what it is, its gradient.
LEARNED = 20


@dataclass(frozen=True)
class Needs:
    """What a compression will need; an estimate, mostly from above.

    Attributes:
        memory: bytes by what takes them, beyond what the process holds already.
        held: bytes that the process holds already, a model in memory among them.
        disk: bytes of the checkpoint; 0 if none is written, or that is not known.
        blocks: how many blocks are solved one after the other.
        layers: how many layers are quantized.
        ways: what would make it fit, by what takes the memory.
        device: whose memory; what a device has no room for of the activations goes to the host.
    """

    memory: Mapping[str, int]
    held: int
    disk: int = 0
    blocks: int = 0
    layers: int = 0
    ways: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def peak(self) -> int:
        """Bytes of memory in all."""
        return self.held + sum(self.memory.values())

    def lines(self) -> list[str]:
        """For people."""
        parts = {"this process now": self.held, **self.memory}
        width = max(map(len, (*parts, "disk, for the checkpoint")))
        found = [f"{self.layers} layers in {self.blocks} blocks"]
        found += [f"  {name:<{width}}  {size / 1e9:8.2f} GB" for name, size in parts.items()]
        found.append(f"  {'memory at most':<{width}}  {self.peak / 1e9:8.2f} GB of {self._available() / 1e9:.2f} GB")
        if self.disk:
            found.append(f"  {'disk, for the checkpoint':<{width}}  {self.disk / 1e9:8.2f} GB")
        return found

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            BitpressError: says what takes most, and the setting that would make it fit.
        """
        if self.device == "cpu":
            self._check(self.memory, self.device)
            return
        self._check({name: size for name, size in self.memory.items() if name != ACTIVATIONS}, self.device)
        self._check({name: size for name, size in self.memory.items() if name == ACTIVATIONS}, "cpu")

    def _check(self, memory: Mapping[str, int], device: str) -> None:
        needed, free = sum(memory.values()), free_memory(device)
        if needed <= free:
            return
        most = sorted(memory, key=lambda name: -memory[name])
        parts = ", ".join(f"{name} {memory[name] / 1e9:.2f} GB" for name in most)
        way = next((self.ways[name] for name in most if name in self.ways), "use a machine with more memory")
        where = "" if device == "cpu" else f" of {device}"
        raise BitpressError(
            f"this would need {needed / 1e9:.2f} GB of memory{where} more, and {free / 1e9:.2f} GB are free "
            f"({parts}): {way}."
        )

    def _available(self) -> int:
        return self.held + free_memory(self.device)


MODEL, ACTIVATIONS, STATISTICS, SOLVING, LEARNING, BLOCK, RESULT, TENSORS = (
    "the model",
    "activations of all batches",
    "statistics of a block",
    "solving a layer",
    "learning a block",
    "the largest block",
    "the compressed weights",
    "the tensors at work",
)


def estimate(
    state: State,
    wanted: Mapping[str, Statistic],
    *,
    tokens: int,
    per_token: int,
    streamed: bool,
    disk: int = 0,
    learns: bool = False,
    device: torch.device | str = "cpu",
) -> Needs:
    """What a session that has been checked will need.

    Args:
        state: the session's.
        wanted: the statistics that are kept of each layer, by name; see :func:`wanted_statistics`.
        tokens: of all calibration batches.
        per_token: bytes of a token between two blocks; see :func:`bytes_per_token`.
        streamed: the model is on the disk.
        disk: bytes of the checkpoint.
        learns: the rounding of each block is learned.
        device: where it is computed.
    """
    device = torch.device(device)
    # On a device the next block is read while one is worked on.
    blocks_held = 1 if device.type == "cpu" else 2
    largest = max(_bytes(block.module) for block in state.blocks)
    layers = {name: layer for block in state.blocks for name, layer in block.layers.items()}
    asks = any(wanted.values()) or learns
    activations = 0 if not asks or state.activations_on == "disk" else tokens * per_token
    # What the original model has between two blocks, and what the block should give.
    activations *= 3 if learns else 1
    solved = [_solving(layer, asks=bool(wanted[name])) for name, layer in layers.items()]
    memory = {
        BLOCK: blocks_held * largest if streamed else 0,
        ACTIVATIONS: activations,
        STATISTICS: max(_statistics(block, state.inputs, wanted) for block in state.blocks),
        SOLVING: max(solved, default=0) + (0 if streamed else largest),
        LEARNING: LEARNED * max(map(_values, state.blocks)) if learns else 0,
        RESULT: 0 if streamed else disk or sum(_packed(state, name, layer) for name, layer in layers.items()),
    }
    ways = {ACTIVATIONS: 'state activations="disk", or fewer num_calibration_samples'}
    if not streamed:
        ways[RESULT] = "give the model's path and output_dir, so that it stays on the disk"
    ways[BLOCK] = ways[STATISTICS] = ways[LEARNING] = "state smaller blocks with sequential_targets"
    return Needs(
        {name: size for name, size in memory.items() if size},
        process_memory(device),
        disk,
        len(state.blocks),
        len(layers),
        ways,
        str(device),
    )


def wanted_statistics(state: State, modifiers: Sequence[Modifier]) -> dict[str, Statistic]:
    """What any of the modifiers asks for of each layer, once they are initialized."""
    wanted = dict.fromkeys(state.schemes, Statistic.NONE)
    for modifier in modifiers:
        for name in wanted:
            wanted[name] |= modifier.required_statistics(state, name)
    return wanted


def bytes_per_token(blocks: list[Block]) -> int:
    """Of what a block is called with in the dry run, its first tensor; 0 if none ran."""
    found = 0
    for block in blocks:
        for call in block.calls[:1]:
            first = next((x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)), None)
            if first is not None and first.dim() > 1:
                found = max(found, first.shape[-1] * first.element_size())
    return found


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _values(block: Block) -> int:
    return sum(weight_matrix(layer).numel() for layer in block.layers.values())


def _solving(layer: nn.Module, *, asks: bool) -> int:
    rows, columns = weight_matrix(layer).shape
    return 4 * (WEIGHT_COPIES * rows * columns + (GRAM_COPIES * columns**2 if asks else 0))


def _statistics(block: Block, inputs: Mapping[str, int], wanted: Mapping[str, Statistic]) -> int:
    """Layers that share an input share their statistics; where no dry run tells, those beside each other do."""
    squares: dict[Any, int] = {}
    for name, layer in block.layers.items():
        beside = name if isinstance(layer, ExpertLinear) else name.rpartition(".")[0]
        key = inputs.get(name, (beside, weight_matrix(layer).shape[1]))
        count = sum(1 for each in SQUARE if each in wanted[name])
        squares[key] = max(squares.get(key, 0), 4 * count * weight_matrix(layer).shape[1] ** 2)
    return sum(squares.values())


def _packed(state: State, name: str, layer: nn.Module) -> int:
    return weight_matrix(layer).numel() * int(state.schemes[name].weights.num_bits) // 8
