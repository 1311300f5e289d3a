"""What a compression did, as figures that JSON can hold."""

from importlib.metadata import version
from typing import Any

from compressed_tensors.quantization import DynamicType

from bitpress.models.experts import find_layer
from bitpress.pipelines.data import CalibrationData
from bitpress.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from bitpress.session import Session

BASES = ("input", "output")


def summarize(session: Session, data: CalibrationData | None) -> dict[str, Any]:
    """Layers, mappings, bytes, seconds by phase and versions of a finished session.

    Errors are relative to the energy of a layer's output where its inputs are known (``relative_error``), and of its
    weight (``weight_error``); bytes are those of the quantized layers' weights, scales and zero points. Layers and
    attentions whose activations are quantized say how, with the scales that are not taken at run time. Where modifiers
    chose schemes, ``allocations`` says which, and by how much the loss was estimated to grow with each of them.
    """
    state = session.state
    layers = {
        name: {
            **state.layer_records.get(name, {}),
            "stored_bytes": stored,
            **_activations(session, name, {b: getattr(state.schemes[name], f"{b}_activations") for b in BASES}),
        }
        for name, stored in session.stored_bytes.items()
    }
    before = sum(_weight_bytes(session, name) for name in layers)
    return {
        "pipeline": session.pipeline,
        "samples": data.samples if data else 0,
        "tokens": data.tokens if data else 0,
        "seconds": {phase: round(seconds, 3) for phase, seconds in state.watch.seconds.items()},
        "quantized_layers": len(layers),
        "weight_bytes_before": before,
        "weight_bytes_after": sum(session.stored_bytes.values()),
        **(
            {"ranks": state.ranks.size, "exchanging_seconds": round(state.ranks.seconds, 3)}
            if state.ranks.size > 1
            else {}
        ),
        **({"distillation": state.distillation} if state.distillation else {}),
        **({"allocations": state.allocations} if state.allocations else {}),
        "layers": layers,
        "attentions": {
            name: _activations(session, name, dict.fromkeys(each.states, each.args))
            for name, each in state.attentions.items()
        },
        "mappings": state.mapping_records,
        "layers_without_mapping": state.unmapped,
        "experts_with_few_tokens": state.few_tokens,
        "versions": {name: version(name) for name in ("bitpress", "torch", "compressed-tensors")},
    }


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
