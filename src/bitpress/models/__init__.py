"""The structure of a model: its linear layers, its blocks, and which of its channels may be rescaled."""

from bitpress.models.blocks import Block, Call, find_blocks
from bitpress.models.linears import in_features, is_linear, weight_matrix
from bitpress.models.simple_nn import (
    QuantizedNN,
    SimpleNN,
    compute_activation_stats,
    quantize_model,
    search_module_scale,
)

__all__ = [
    "Block",
    "Call",
    "QuantizedNN",
    "SimpleNN",
    "compute_activation_stats",
    "find_blocks",
    "in_features",
    "is_linear",
    "quantize_model",
    "search_module_scale",
    "weight_matrix",
]
