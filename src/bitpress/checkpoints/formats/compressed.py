"""compressed-tensors, as a format to convert to."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bitpress.checkpoints.config import quantization_config
from bitpress.checkpoints.formats.layer import Layer
from bitpress.checkpoints.formats.structure import Structure
from bitpress.checkpoints.stored import Stored
from bitpress.errors import BitpressError
from bitpress.quantization import QuantizedWeight, stored_format


def to_tensors(layer: Layer, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What is stored of a weight."""
    return weight.pack().tensors(stored_format(layer.scheme))


def config(structure: Structure, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """The ``quantization_config``.

    Raises:
        BitpressError: the model has no linear layer of such a name.
    """
    model = structure.model
    read = {}
    for stored, layer in layers.items():
        if stored not in structure.in_model:
            raise BitpressError(f"{stored} is quantized, and {type(model).__name__} has no linear layer of that name.")
        name = structure.in_model[stored]
        read[name] = structure.module(stored)
        read[name].quantization_scheme = layer.scheme
    stored_parts = Stored.of(model, {}, read, {})
    return quantization_config(model, read, stored_parts.apart, stored_parts.whole)
