"""Weights quantized from shard to shard: no model is built, and no more is in memory than a few layers.

While one tensor is worked on the next is read and the last is written, each by a thread of its own.
"""

import itertools
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoints.headers import StoredTensor
from bitpress.checkpoints.journal import CHECKSUMS, Journal
from bitpress.checkpoints.layout import ShardWriter
from bitpress.checkpoints.planned import Planned
from bitpress.checkpoints.source import CannotStreamError, Source
from bitpress.checkpoints.stored import stored_tensors
from bitpress.models.experts import ExpertLinear, find_layer
from bitpress.models.linears import as_parameter
from bitpress.modifiers import Modifier, QuantizationModifier, State
from bitpress.modifiers.fused import families
from bitpress.modifiers.observers import observed_ranges, states_observer, statistics_of_observer
from bitpress.pipelines.solving import OnProgress, Progress
from bitpress.quantization import (
    PackedWeight,
    QuantizationArgs,
    QuantizedWeight,
    has_global_scale,
    is_static,
    shared_global_scale,
)
from bitpress.solvers import check_finite, packed_to_nearest
from bitpress.solvers.nearest import relative_error

# Bytes read between two lines of the journal: what is done again after a kill, at most.
BETWEEN_LINES = 256 << 20
# Tensors that are read, worked on or written at a time.
BUFFERS = 4
_ALIGNED = 64
# In the journal: tensors of the model's state that were read, and what the report says of layers.
READ = "read"
LAYERS = "layers"


def check_recipe_by_tensors(modifiers: Sequence[Modifier]) -> None:
    """Refuse recipes that do more than to round each weight by itself.

    Raises:
        CannotStreamError: names what does.
    """
    for modifier in modifiers:
        if type(modifier) is not QuantizationModifier or modifier.choose_from is not None:
            raise CannotStreamError(f"{type(modifier).__name__} needs more than one weight at a time.")


def check_by_tensors(state: State, source: Source) -> None:
    """Refuse layers that are not quantized from their weights alone, or have none of their own.

    Raises:
        CannotStreamError: names one.
    """
    for name in (*state.attentions, *state.taps):
        raise CannotStreamError(f"the states of {name} are quantized, which needs data or its code.")
    for name, scheme in state.schemes.items():
        if is_static(scheme.input_activations) or is_static(scheme.output_activations):
            raise CannotStreamError(f"{name} has static activations, which need data.")
        if statistics_of_observer(scheme.weights):
            raise CannotStreamError(f"the ranges of {name} are chosen by its inputs, which needs data.")
        if isinstance(find_layer(state.model, name), ExpertLinear) or source.is_converted(f"{name}.weight"):
            raise CannotStreamError(f"the weight of {name} is not a tensor of its own.")


@dataclass(frozen=True)
class _Unit:
    """What is read at once: a tensor that stays as it is, a layer, or layers that share a global scale."""

    names: tuple[str, ...]  # of parameters and buffers, or of unclaimed tensors
    layers: tuple[str, ...] = ()
    claimed: bool = True

    def stored(self, source: Source) -> list[StoredTensor]:
        """All that it is made of."""
        return [source.shards[origin] for name in self.names for origin in source.origins(name)]


@dataclass
class _Group:
    """What one line of the journal is about."""

    units: list[_Unit]
    checksums: dict[str, str] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.units[0].names[0]


def run_by_tensors(
    state: State, plan: Planned, writer: ShardWriter, journal: Journal, on_progress: OnProgress = lambda _: None
) -> None:
    """Quantize every layer of ``state`` and write it; write all other tensors as they are.

    Fills ``state.layer_records``. What the journal has already is not done again.

    Raises:
        BitpressError: a weight with NaN or infinite values, a file that cannot be read or written.
    """
    done = {name for entry in journal.verify(writer).values() for name in entry[READ]}
    left = [unit for unit in _units(state, plan) if not done.issuperset(unit.names)]
    groups = list(_groups(left, plan.source))
    with _Reader(plan.source, left) as reader, _Writing(writer) as writing:
        for index, group in enumerate(groups):
            on_progress(Progress(index, len(groups), group.name, "solve"))
            for unit in group.units:
                _solve(state, plan, reader, writing, group, unit)
            writing.finish(group, journal)
    if writer.missing():
        raise RuntimeError(f"{writer.missing()[0]} was not written")
    for entry in journal.entries.values():
        for name, record in entry[LAYERS].items():
            state.layer_records[name] = {**record, "shape": tuple(record["shape"])}


def _solve(state: State, plan: Planned, reader: "_Reader", writing: "_Writing", group: _Group, unit: _Unit) -> None:
    with state.watch.phase("read"):
        tensors, release = reader.next()
    written: dict[str, Tensor] = {}
    if not unit.layers:
        dense = plan.stored.dense if unit.claimed else {}
        written = {dense.get(name, name): tensor for name, tensor in tensors.items()}
    with state.watch.phase("solve"):
        matrices = {}
        for name in unit.layers:
            module, weight = find_layer(state.model, name), tensors[f"{name}.weight"]
            matrices[name] = as_parameter(module, weight)
        args = state.schemes[unit.layers[0]].weights if unit.layers else None
        shared = shared_global_scale(list(matrices.values()), args) if args and has_global_scale(args) else None
        for name, matrix in matrices.items():
            packed, figures = _quantized(state, name, matrix, shared)
            layer = find_layer(plan.saved, name)
            if name in plan.stored.layers:
                own = stored_tensors(layer, packed)
                written |= {f"{plan.stored.layers[name]}.{kind}": tensor for kind, tensor in own.items()}
            else:
                values = as_parameter(layer, packed.unpack().dequantize())
                written[plan.stored.dense[f"{name}.weight"]] = values
            group.layers[name] = figures
    writing.write(group, written, release)


def _quantized(
    state: State, name: str, matrix: Tensor, global_scale: Tensor | None
) -> tuple[PackedWeight, dict[str, Any]]:
    """A layer's packed weight, and what the report says of it."""
    args = state.schemes[name].weights
    if states_observer(args) or _has_equal_points(matrix, args):
        check_finite(matrix, name)
        ranges = observed_ranges(matrix, args, None, global_scale)
        quantized = state.owners[name].solve(matrix, args, None, ranges, global_scale)
        values = quantized.dequantize()
        found = QuantizedWeight.on_grid(values, quantized.scale, quantized.zero_point, args, quantized.global_scale)
        packed, error = found.pack(), relative_error(values, matrix)
    else:
        packed, error = packed_to_nearest(matrix, args, global_scale, name)
    return packed, {"shape": list(matrix.shape), "bits": args.num_bits, "weight_error": error}


def _has_equal_points(matrix: Tensor, args: QuantizationArgs) -> bool:
    """True where bfloat16 rounds neighbours to one value, of which a model in memory would not know the point."""
    return matrix.dtype == torch.bfloat16 and args.num_bits == 8 and not args.symmetric


def _units(state: State, plan: Planned) -> list[_Unit]:
    """In the order of the checkpoint's bytes."""
    shared = [names for block in state.blocks for names in families(state, block)]
    together = {name: tuple(names) for names in shared for name in names}
    of_layers = dict.fromkeys(together.get(name, (name,)) for name in state.schemes)
    units = [_Unit(tuple(f"{name}.weight" for name in names), names) for names in of_layers]
    weights = {f"{name}.weight" for name in state.schemes}
    units += [
        _Unit((name,)) for name, stored in plan.stored.dense.items()
        if name not in weights and stored in plan.layout.places
    ]  # fmt: skip
    units += [_Unit((name,), claimed=False) for name in plan.source.unclaimed]
    order = {tensor: position for position, tensor in enumerate(plan.source.shards.values())}
    return sorted(units, key=lambda unit: order[unit.stored(plan.source)[0]])


def _groups(units: Sequence[_Unit], source: Source) -> Iterator[_Group]:
    found: list[_Unit] = []
    size = 0
    for unit in units:
        found.append(unit)
        size += sum(tensor.nbytes for tensor in unit.stored(source))
        if size >= BETWEEN_LINES:
            yield _Group(found)
            found, size = [], 0
    if found:
        yield _Group(found)


class _Reader:
    """Reads ahead into a few buffers that are used again and again: fresh memory costs more than reading does."""

    def __init__(self, source: Source, units: Sequence[_Unit]) -> None:
        self._source = source
        self._buffers: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._buffers.put(torch.empty(0, dtype=torch.uint8))
        self._pool = ThreadPoolExecutor(1, "bitpress-read")
        self._read = iter([self._pool.submit(self._of, unit) for unit in units])

    def next(self) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The tensors of the next unit, and what is to be called when they are not needed any more."""
        return next(self._read).result()

    def _of(self, unit: _Unit) -> tuple[dict[str, Tensor], Callable[[], None]]:
        buffer = self._buffers.get()
        if buffer is None:
            raise RuntimeError("the run has ended")
        stored = unit.stored(self._source) if unit.claimed and len(unit.names) == len(unit.stored(self._source)) else []
        starts = list(itertools.accumulate((-(-t.nbytes // _ALIGNED) * _ALIGNED for t in stored), initial=0))
        memory = torch.empty(starts[-1], dtype=torch.uint8) if buffer.numel() < starts[-1] else buffer
        out = {
            name: memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, tensor, start in zip(unit.names, stored, starts, strict=False)
            if tensor.nbytes
        }
        if unit.claimed:
            found = self._source.read(unit.names, out)
        else:
            found = {name: self._source.shards.read(name) for name in unit.names}
        return found, lambda: self._buffers.put(memory)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for none in [None] * BUFFERS:
            self._buffers.put(none)
        self._pool.shutdown(cancel_futures=True)


class _Writing:
    """Writes behind."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, "bitpress-write")
        self._pending: list[Future[None]] = []
        self._failed = False

    def write(self, group: _Group, tensors: Mapping[str, Tensor], release: Callable[[], None]) -> None:
        """Write tensors, and then let go of what they were read into."""
        self._submit(lambda: self._write(group, tensors, release))

    def _write(self, group: _Group, tensors: Mapping[str, Tensor], release: Callable[[], None]) -> None:
        try:
            for name, tensor in tensors.items():
                group.checksums[name] = self._writer.write(name, tensor)
        except BaseException:
            self._failed = True
            raise
        finally:
            release()

    def finish(self, group: _Group, journal: Journal) -> None:
        """Note that a group is done, once it is on the disk."""
        self._submit(lambda: self._finish(group, journal))

    def _finish(self, group: _Group, journal: Journal) -> None:
        if self._failed:
            return
        self._writer.sync()
        read = [name for unit in group.units for name in unit.names]
        journal.record(group.name, {READ: read, CHECKSUMS: group.checksums, LAYERS: group.layers})

    def _submit(self, task: Callable[[], None]) -> None:
        for done in [each for each in self._pending if each.done()]:
            self._pending.remove(done)
            done.result()
        self._pending.append(self._pool.submit(task))

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for each in self._pending:
                each.result()
