"""What a compression did, as figures that JSON can hold."""

from importlib.metadata import version
from typing import Any

from bitpress.models.experts import find_layer
from bitpress.pipelines.data import CalibrationData
from bitpress.session import Session


def summarize(session: Session, data: CalibrationData | None) -> dict[str, Any]:
    """Layers, mappings, bytes, seconds by phase and versions of a finished session.

    Errors are relative to the energy of a layer's output where its inputs are known (``relative_error``), and of its
    weight (``weight_error``); bytes are those of the quantized layers' weights, scales and zero points. Where modifiers
    chose schemes, ``allocations`` says which, and by how much the loss was estimated to grow with each of them.
    """
    state = session.state
    layers = {
        name: {**state.layer_records.get(name, {}), "stored_bytes": stored}
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
        **({"allocations": state.allocations} if state.allocations else {}),
        "layers": layers,
        "mappings": state.mapping_records,
        "layers_without_mapping": state.unmapped,
        "experts_with_few_tokens": state.few_tokens,
        "versions": {name: version(name) for name in ("bitpress", "torch", "compressed-tensors")},
    }


def _weight_bytes(session: Session, name: str) -> int:
    weight: Any = find_layer(session.model, name).weight
    return int(weight.numel() * weight.element_size())
