"""What the modifiers of a recipe and the pipeline that drives them share."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bitpress.memory import process_memory
from bitpress.models.blocks import Block
from bitpress.models.taps import Tap
from bitpress.quantization import QuantizationScheme, QuantizedWeight
from bitpress.ranks import Ranks, current
from bitpress.statistics import InputStatistics


class Stopwatch:
    """What each phase takes.

    Attributes:
        seconds: that were spent in it.
        resident: the most bytes that the process held at an end of it; 0 where the system does not say.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.resident: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside the ``with`` is added to the phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.resident[name] = max(self.resident.get(name, 0), process_memory())


@dataclass(frozen=True)
class Measured:
    """What the gradients of a measuring pass are of.

    Attributes:
        loss: "kl", the divergence from the model's own predictions in nats; "output", half the relative squared error
            of the model's output.
        draws: how many gradients each layer had.
        count: predictions ("kl") or values ("output") that the draws had in all.
    """

    loss: Literal["kl", "output"]
    draws: int
    count: int


@dataclass(frozen=True)
class Writing:
    """How much text the model writes to calibrate on; see :class:`bitpress.modifiers.GeneratedTextModifier`."""

    samples: int
    length: int


@dataclass(frozen=True)
class Tuning:
    """How the scales are tuned after the last block; see :class:`bitpress.modifiers.DistillationModifier`."""

    epochs: int
    learning_rate: float
    held_out: float
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Rounding:
    """How the rounding of each block is learned; see :class:`bitpress.modifiers.LearnedRoundingModifier`."""

    iterations: int
    batch_size: int
    travel: float
    learning_rate: float


@dataclass
class State:
    """One compression: the model, what is targeted, and what is known of the block that is being solved.

    Attributes:
        model: the model; its parameters hold the new values of the current block only, until all is done.
        schemes: the scheme of every layer that will be quantized, by the layer's name.
        owners: the modifier that quantizes each of these layers.
        blocks: the parts that are solved one after the other.
        attentions: how the states of attention are quantized, by its name.
        taps: where ranges are taken that are not of a layer's input, by name; ``owners`` has their modifiers too.
        activations: the tensors of static grids, by the name of the layer or attention.
        candidates: the schemes among which a modifier will choose for a layer, by name; until it has, the layer's
            scheme is the first of them.
        inputs: a number for each distinct input tensor of the dry run, by the layer's name; a layer that did not run is
            absent.
        allocations: what each modifier that chooses has chosen and why, for the report.
        statistics: of the current block's layers; a layer that did not run, or whose modifiers ask for nothing, is
            absent. Layers that share their input share the object.
        ranges: scale and zero point that a modifier has chosen for a layer of the current block, for the one that
            quantizes it.
        global_scales: of the current block's layers that have one (NVFP4): (1,), float32.
        quantized: the current block's layers that have been quantized.
        unrounded: what the weights of these layers were just before, where rounding is learned.
        layer_records: a dictionary of figures per quantized layer, for the report.
        block_records: how far the output of each solved block is off, by its name, for the report; see
            :mod:`bitpress.pipelines.witness`.
        output_energies: of the current block's layers, of the rows that :mod:`bitpress.modifiers.steps` samples.
        mapping_records: a dictionary of figures per smoothed mapping, for the report.
        unmapped: why a layer has no mapping that scales its input, by name, for the report.
        rounding: how rounding is learned once a block is solved, if it is.
        tuning: how scales are tuned once all is solved, if they are.
        distillation: what that brought, for the report.
        watch: the seconds spent in each phase.
        seed: of everything random.
        activations_on: where batches that wait keep their activations: "memory", "disk", or None for what fits.
        scratch: a directory for such files; None for the system's.
        min_expert_tokens: an expert that saw fewer is solved from what all experts of its layer saw.
        few_tokens: the tokens that each such expert's layer saw, by name.
        ranks: the processes that this one compresses the model with.
    """

    model: nn.Module
    schemes: dict[str, QuantizationScheme]
    owners: dict[str, Any]
    blocks: list[Block]
    attentions: dict[str, Any] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)
    activations: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    candidates: dict[str, list[QuantizationScheme]] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    allocations: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    ranges: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    global_scales: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    unrounded: dict[str, Tensor] = field(default_factory=dict)
    layer_records: dict[str, dict[str, Any]] = field(default_factory=dict)
    block_records: dict[str, dict[str, float]] = field(default_factory=dict)
    output_energies: dict[str, float] = field(default_factory=dict)
    mapping_records: list[dict[str, Any]] = field(default_factory=list)
    unmapped: dict[str, str] = field(default_factory=dict)
    rounding: Rounding | None = None
    tuning: Tuning | None = None
    distillation: dict[str, Any] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)
    seed: int = 42
    activations_on: Literal["memory", "disk"] | None = None
    scratch: Path | None = None
    min_expert_tokens: int = 0
    few_tokens: dict[str, int] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=current)
