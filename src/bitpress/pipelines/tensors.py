"""Weights quantized from shard to shard: no model is built, and no more is in memory than a few layers.

Each thread reads a tensor, works on it and writes it: no core waits for another.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
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
from bitpress.modifiers.spread import spread
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
# Threads at most, each with a tensor in memory.
WORKERS = 8
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
    done: int = 0

    @property
    def name(self) -> str:
        return self.units[0].names[0]

    @property
    def line(self) -> dict[str, Any]:
        """For the journal."""
        read = [name for unit in self.units for name in unit.names]
        return {READ: read, CHECKSUMS: self.checksums, LAYERS: self.layers}


def most_at_once(state: State, plan: Planned) -> int:
    """Bytes of the tensors that are in memory at a time, at most, and of what is made of them."""
    sizes = sorted(sum(t.nbytes for t in unit.stored(plan.source)) for unit in _units(state, plan))
    return 2 * sum(sizes[-_count_workers() :])


def _count_workers() -> int:
    return min(WORKERS, torch.get_num_threads())


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
    count = 0
    with _Workers(state, plan, writer, journal) as workers, state.watch.phase("solve"):
        for finished in as_completed([workers.submit(group, unit) for group in groups for unit in group.units]):
            count += 1
            on_progress(Progress(count, len(left), finished.result(), "solve", "tensors"))
    if writer.missing():
        raise RuntimeError(f"{writer.missing()[0]} was not written")
    records = {name: record for entry in journal.entries.values() for name, record in entry[LAYERS].items()}
    for name in (name for name in state.schemes if name in records):
        state.layer_records[name] = {**records[name], "shape": tuple(records[name]["shape"])}


class _Workers:
    """Threads that each take a unit from the files to the checkpoint, and one that notes which groups are done."""

    def __init__(self, state: State, plan: Planned, writer: ShardWriter, journal: Journal) -> None:
        self._state, self._plan, self._writer, self._journal = state, plan, writer, journal
        self._reader = _Reader(plan.source)
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._noted: list[Future[None]] = []

    def __enter__(self) -> "_Workers":
        count = _count_workers()
        self._threads = _threads_of_torch(torch.get_num_threads() // count)
        self._threads.__enter__()
        self._pool = ThreadPoolExecutor(count, "bitpress-tensors")
        self._notes = ThreadPoolExecutor(1, "bitpress-journal")
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            self._failed.set()
        self._pool.shutdown(cancel_futures=kind is not None)
        self._notes.shutdown()
        self._threads.__exit__(None, None, None)
        for noted in self._noted if kind is None else ():
            noted.result()

    def submit(self, group: _Group, unit: _Unit) -> "Future[str]":
        """Have a unit done; its name is what comes of it."""
        return self._pool.submit(self._do, group, unit)

    def _do(self, group: _Group, unit: _Unit) -> str:
        if self._failed.is_set():
            return unit.names[0]
        try:
            written, layers = _solve(self._state, self._plan, unit, self._reader.read(unit))
            checksums = {name: self._writer.write(name, tensor) for name, tensor in written.items()}
        except BaseException:
            self._failed.set()
            raise
        with self._lock:
            group.checksums |= checksums
            group.layers |= layers
            group.done += 1
            if group.done == len(group.units):
                self._noted.append(self._notes.submit(self._note, group))
        return unit.names[0]

    def _note(self, group: _Group) -> None:
        """Note that a group is done, once it is on the disk."""
        self._writer.sync()
        self._journal.record(group.name, group.line)


@contextmanager
def _threads_of_torch(count: int) -> Iterator[None]:
    """Inside the ``with`` threads that begin there use so many of torch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _solve(
    state: State, plan: Planned, unit: _Unit, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is to be written of a unit, and what the report says of its layers."""
    if not unit.layers:
        dense = plan.stored.dense if unit.claimed else {}
        return {dense.get(name, name): tensor for name, tensor in tensors.items()}, {}
    written: dict[str, Tensor] = {}
    records = {}
    matrices = {n: as_parameter(find_layer(state.model, n), tensors[f"{n}.weight"]) for n in unit.layers}
    args = state.schemes[unit.layers[0]].weights
    shared = shared_global_scale(list(matrices.values()), args) if has_global_scale(args) else None
    for name, matrix in matrices.items():
        packed, records[name] = _quantized(state, name, matrix, shared)
        layer = find_layer(plan.saved, name)
        if name in plan.stored.layers:
            own = stored_tensors(layer, packed)
            written |= {f"{plan.stored.layers[name]}.{kind}": tensor for kind, tensor in own.items()}
        else:
            values = as_parameter(layer, packed.unpack().dequantize())
            written[plan.stored.dense[f"{name}.weight"]] = values
    return written, records


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
    figures = {"shape": list(matrix.shape), "bits": args.num_bits, "weight_error": error, "spread": spread(packed)}
    return packed, figures


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
    """Reads into a buffer that each thread uses again and again: fresh memory costs more than reading does."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._of_thread = threading.local()
        self._converting = threading.Lock()

    def read(self, unit: _Unit) -> dict[str, Tensor]:
        """The tensors of a unit; the next call in this thread overwrites them."""
        if not unit.claimed:
            return {name: self._source.shards.read(name) for name in unit.names}
        stored = unit.stored(self._source) if len(unit.names) == len(unit.stored(self._source)) else []
        starts = list(itertools.accumulate((-(-t.nbytes // _ALIGNED) * _ALIGNED for t in stored), initial=0))
        memory = getattr(self._of_thread, "memory", None)
        if memory is None or memory.numel() < starts[-1]:
            memory = self._of_thread.memory = torch.empty(starts[-1], dtype=torch.uint8)
        out = {
            name: memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, tensor, start in zip(unit.names, stored, starts, strict=False)
            if tensor.nbytes
        }
        # What is made of several tensors is put together in the model.
        converts = any(self._source.is_converted(name) for name in unit.names)
        with self._converting if converts else nullcontext():
            return self._source.read(unit.names, out)
