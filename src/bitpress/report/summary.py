"""What a compression did, as figures that JSON can hold; docs/report.md says what each field is."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import DynamicType

from bitpress.models.experts import find_layer
from bitpress.pipelines.data import CalibrationData
from bitpress.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from bitpress.session import Session

BASES = ("input", "output")
LIBRARIES = ("bitpress", "torch", "compressed-tensors", "transformers")
# Of so many layers, those with the greatest errors, there are histograms.
WORST = 6


def summarize(session: Session, data: CalibrationData | None, name: str = "") -> dict[str, Any]:
    """Layers, blocks, mappings, bytes, seconds and memory by phase, and versions of a finished session.

    ``name`` is how the user named the model.

    Errors are relative to the energy of a layer's output where its inputs are known (``relative_error``), and of its
    weight (``weight_error``); bytes are those of the quantized layers' weights, scales and zero points. Layers and
    attentions whose activations are quantized say how, with the scales that are not taken at run time. Where modifiers
    chose schemes, ``allocations`` says which, and by how much the loss was estimated to grow with each of them.
    """
    state = session.state
    layers = {
        name: {
            **{kind: value for kind, value in state.layer_records.get(name, {}).items() if kind != "spread"},
            "stored_bytes": stored,
            "dense_bytes": _weight_bytes(session, name),
            **_grid(state.schemes[name].weights),
            **_activations(session, name, {b: getattr(state.schemes[name], f"{b}_activations") for b in BASES}),
        }
        for name, stored in session.stored_bytes.items()
    }
    spreads = {name: figures["spread"] for name, figures in state.layer_records.items() if "spread" in figures}
    before, after = (sum(each[kind] for each in layers.values()) for kind in ("dense_bytes", "stored_bytes"))
    whole = _model_bytes(session.model)
    return {
        "model": {"name": _shown(name), "class": type(session.model).__name__},
        "pipeline": session.pipeline,
        "samples": data.samples if data else 0,
        "tokens": data.tokens if data else 0,
        "seconds": {phase: round(seconds, 3) for phase, seconds in state.watch.seconds.items()},
        "resident_bytes": state.watch.resident,
        "quantized_layers": len(layers),
        "weight_bytes_before": before,
        "weight_bytes_after": after,
        "model_bytes_before": whole,
        "model_bytes_after": whole - before + after,
        "bits_per_weight": round(8 * after / max(1, sum(_count(session, name) for name in layers)), 4),
        **(
            {"ranks": state.ranks.size, "exchanging_seconds": round(state.ranks.seconds, 3)}
            if state.ranks.size > 1
            else {}
        ),
        **({"distillation": state.distillation} if state.distillation else {}),
        **({"allocations": state.allocations} if state.allocations else {}),
        "layers": layers,
        "blocks": {
            block.name: {"layers": list(block.layers), **state.block_records.get(block.name, {})}
            for block in state.blocks
        },
        "histograms": {name: spreads[name] for name in worst_layers(layers, WORST) if name in spreads},
        "attentions": {
            name: _activations(session, name, dict.fromkeys(each.states, each.args))
            for name, each in state.attentions.items()
        },
        "mappings": state.mapping_records,
        "layers_without_mapping": state.unmapped,
        "experts_with_few_tokens": state.few_tokens,
        "recipe": session.recipe.to_yaml(),
        "versions": {**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()},
    }


def worst_layers(layers: dict[str, dict[str, Any]], count: int) -> list[str]:
    """The names of those with the greatest errors: of their outputs where these are known of any, else of weights."""
    known = [name for name, figures in layers.items() if "relative_error" in figures]
    kind = "relative_error" if known else "weight_error"
    return sorted(known or layers, key=lambda name: -layers[name].get(kind, 0.0))[:count]


def _shown(name: str) -> str:
    """A hub id, or of a path its last part: where a model lay on somebody's disk is nobody else's business."""
    local = name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).expanduser().exists()
    return Path(name).expanduser().resolve().name if name and local else name


def _grid(args: QuantizationArgs) -> dict[str, Any]:
    """What else is to be said of a layer's scheme."""
    return {
        "type": QuantizationType(args.type).value,
        "strategy": QuantizationStrategy(args.strategy).value,
        "group_size": args.group_size,
        "symmetric": args.symmetric,
    }


def _model_bytes(model: Any) -> int:
    return sum(t.numel() * t.element_size() for t in model.parameters())


def _count(session: Session, name: str) -> int:
    weight: Any = find_layer(session.model, name).weight
    return int(weight.numel())


def _activations(session: Session, name: str, grids: dict[str, QuantizationArgs | None]) -> dict[str, Any]:
    """How activations are quantized, by their name, with their scales; nothing of those that are not."""
    tensors = session.state.activations.get(name, {})
    return {
        f"{base}_activations" if base in BASES else base: {
            "bits": args.num_bits,
            "type": QuantizationType(args.type).value,
            "strategy": QuantizationStrategy(args.strategy).value,
            "dynamic": args.dynamic if isinstance(args.dynamic, bool) else DynamicType(args.dynamic).value,
            **{kind: t.flatten().tolist() for kind, t in tensors.items() if kind.startswith(f"{base}_")},
        }
        for base, args in grids.items()
        if args is not None
    }


def _weight_bytes(session: Session, name: str) -> int:
    weight: Any = find_layer(session.model, name).weight
    return int(weight.numel() * weight.element_size())
