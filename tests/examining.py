"""What bitpress makes of one architecture of the zoo: mappings, smoothing, quantizing, saving, loading."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import architectures
import torch
import transformers
from architectures import ARCHITECTURES
from torch import Tensor, nn

import bitpress
from bitpress.models.blocks import find_blocks
from bitpress.models.experts import ExpertLinear, named_layers, routers
from bitpress.models.linears import is_linear, weight_matrix
from bitpress.models.proofs import restored
from bitpress.models.smoothing import divide_outputs, multiply_inputs, out_channels
from bitpress.modifiers import AWQModifier, QuantizationModifier, State
from bitpress.modifiers.resolving import Resolution, resolve_mappings
from bitpress.pipelines import dry_run
from bitpress.pipelines.calibrating import calibrating
from bitpress.pipelines.data import Batch
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.report.mappings import MappingReport, report_mappings

GROUP = 32


@dataclass
class Examined:
    """What came of one architecture.

    Attributes:
        model: the class.
        report: its mappings.
        moved: how much the output moves when every mapping is applied with random scales, relative to its norm.
        quantized: layers that were quantized; an expert's projection counts once for all experts.
        linears: all linear layers, counted so.
        unquantized: why the others were not, by the layer.
        reader: "transformers" if it gives the same output from the saved checkpoint, else "bitpress.load".
        stored_dense: True if layers are quantized but stored in full precision.
    """

    model: str
    report: MappingReport
    moved: float
    quantized: int = 0
    linears: int = 0
    unquantized: dict[str, str] = field(default_factory=dict)
    reader: str = ""
    stored_dense: bool = False


def examine(name: str) -> Examined:
    """Everything; what does not hold is an assertion that fails."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    probe = architecture.inputs(2, 24, 0)
    layers = {n: m for n, m in named_layers(model) if is_linear(m)}
    resolution, report = resolved(model, probe)
    examined = Examined(type(model).__name__, report, moved_by_smoothing(model, resolution, probe))
    assert examined.moved < 1e-4, f"smoothed, the output moves by {examined.moved:.1e}"
    unfit = {n: f"its inputs are no multiple of {GROUP}" for n, m in layers.items() if _width(m) % GROUP}
    weights = QuantizationArgs(num_bits=4, symmetric=True, group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear", "Conv1D"], weights=weights)
    recipe: list[Any] = [QuantizationModifier(ignore=list(unfit), scheme=scheme, fused=False)]
    if any(resolution.mappings.values()):
        recipe.insert(0, AWQModifier(n_grid=4))
    data = [architecture.inputs(2, 24, seed) for seed in (1, 2)]
    bitpress.oneshot(model, data, recipe, progress=False)
    quantized = model.bitpress.report["layers"]
    examined.quantized, examined.linears = len(_kinds(model, quantized)), len(_kinds(model, layers))
    deciding = set(routers(model))
    examined.unquantized = {
        n: unfit.get(n) or ("it decides about experts" if n in deciding else "it shares its weight")
        for n in _kinds(model, layers) - _kinds(model, quantized)
    }
    examined.reader, examined.stored_dense = saved_and_loaded(model, probe)
    return examined


def row(name: str, examined: Examined) -> str:
    """The line of docs/models.md."""
    kinds = [kind for kind in examined.report.kinds if kind.mappings or len(kind.left) > 1]
    cells = (
        name,
        examined.model,
        str(len(kinds)),
        str(sum(len(kind.mappings) for kind in kinds)),
        "<br>".join(dict.fromkeys(f"{m.smooth} → {_short(m.balance)}" for kind in kinds for m in kind.mappings)),
        _reasons({n: _why(left.why) for kind in examined.report.kinds for left in kind.left for n in left.layers}),
        f"{examined.quantized} of {examined.linears}",
        _reasons(examined.unquantized),
        examined.reader + (" (in part dense)" if examined.stored_dense else ""),
    )
    return f"| {' | '.join(cells)} |"


# The beginnings of the reasons that discovery gives, and how the page says them.
_WHY = {
    "nothing before it absorbs": "nothing absorbs their scale",
    "no layer before it": "nothing before them fits",
    "no norm, linear": "nothing runs before them",
    "it is a block of its own": "blocks of their own",
    "it did not run": "did not run",
    "its block did not run": "did not run",
    "it has no share": "no share in the output",
    "it runs": "run more than once",
    "some of these weights": "shared with other blocks",
}


def _why(reason: str) -> str:
    return next((short for beginning, short in _WHY.items() if reason.startswith(beginning)), "excluded")


def _short(names: Iterable[str]) -> str:
    """Names without the part that they have in common with the first."""
    first, *others = names
    folder = first.rpartition(".")[0]
    return ", ".join([first, *(n.removeprefix(f"{folder}.") if folder else n for n in others)])


def _reasons(whys: dict[str, str]) -> str:
    by_reason: dict[str, dict[str, None]] = {}
    for layer, why in sorted(whys.items()):
        tail = layer.rpartition(".*.")[2].split(".")
        by_reason.setdefault(why, {})[".".join(tail[-2:] if tail[-1].isdigit() else tail[-1:])] = None
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in sorted(by_reason.items()))


def resolved(model: nn.Module, probe: dict[str, Tensor]) -> tuple[Resolution, MappingReport]:
    layers = {n: m for n, m in named_layers(model) if is_linear(m) and not _is_tied(model, m)}
    state = State(model, {}, {}, find_blocks(model, layers))
    with calibrating(model):
        dry_run(state, Batch((), probe))
        resolution = resolve_mappings(model, state.blocks)
    return resolution, report_mappings(model, state.blocks, resolution)


@torch.no_grad()
def moved_by_smoothing(model: nn.Module, resolution: Resolution, probe: dict[str, Tensor]) -> float:
    """Apply every mapping at once, with random scales between 1/2 and 2."""
    before = architectures.output(model, probe)
    generator = torch.Generator().manual_seed(0)
    mappings = [m for found in resolution.mappings.values() for m in found]
    with restored([layer for m in mappings for layer in (m.smooth, *m.balance.values())]):
        for m in mappings:
            if m.channel_map is None:
                continue
            scales = torch.ones(out_channels(m.smooth)).uniform_(0.5, 2, generator=generator)
            at_outputs = torch.ones_like(scales)
            at_outputs[m.channel_map] = scales[m.channel_map]
            divide_outputs(m.smooth, at_outputs)
            for layer in m.balance.values():
                multiply_inputs(layer, scales[m.channel_map] ** m.power)
        after = architectures.output(model, probe)
    return float((after - before).norm() / before.norm())


def saved_and_loaded(model: nn.Module, probe: dict[str, Tensor]) -> tuple[str, bool]:
    """Who gives the same output from the checkpoint, and whether any quantized layer is stored dense."""
    # Whether a weight has a gradient decides which product torch uses for some inputs.
    expected = architectures.output(model.requires_grad_(requires_grad=False), probe)
    with tempfile.TemporaryDirectory() as folder, _messages() as messages:
        model.save_pretrained(folder)
        dense = any("stored dense" in message for message in messages)
        unread = any("bitpress.load" in message for message in messages)
        if hasattr(transformers, type(model).__name__):
            back = bitpress.load(folder, packed=False) if unread else type(model).from_pretrained(folder, dtype="auto")
        else:
            back = bitpress.load(folder, model=type(model)(model.config), packed=False)
        found = architectures.output(back.eval().requires_grad_(requires_grad=False), probe)
        assert torch.equal(found, expected), f"reloaded, the output differs by {float((found - expected).abs().max())}"
    return "bitpress.load" if unread else "transformers", dense


def _width(layer: nn.Module) -> int:
    return weight_matrix(layer).shape[1]


def _is_tied(model: nn.Module, layer: nn.Module) -> bool:
    return sum(p is layer.weight for m in model.modules() for p in m.parameters(recurse=False)) > 1


def _kinds(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Layers by name, those of experts once for all."""
    layers = dict(named_layers(model))
    return {
        f"{n.removesuffix(m.local)}{m.projection.part}" if isinstance(m := layers[n], ExpertLinear) else n
        for n in names
    }


@contextmanager
def _messages() -> Iterator[list[str]]:
    messages: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Listening()
    logging.getLogger("bitpress").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("bitpress").removeHandler(handler)
