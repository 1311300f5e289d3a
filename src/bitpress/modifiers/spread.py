"""For the report: how the values and the scales of a quantized weight are spread, as a few rows show it."""

from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from torch import Tensor

from bitpress.quantization import PackedWeight, QuantizedWeight
from bitpress.quantization.grid import block_shape
from bitpress.quantization.scales import step_sizes

BINS = 32
ROWS = 16


def spread(weight: QuantizedWeight | PackedWeight) -> dict[str, Any]:
    """``{"weights": ..., "scales": ...}``, each ``{"low": ..., "high": ..., "counts": [...]}``, in equal bins.

    Weights are the values that ship, scales the base-2 logarithms of their magnitudes, both of sixteen rows.
    """
    found = _sampled(weight)
    scales = step_sizes(found.scale, found.global_scale).float().abs()
    tiny = torch.finfo(torch.float32).tiny
    return {"weights": _counted(found.dequantize().float()), "scales": _counted(scales.clamp(min=tiny).log2())}


def _sampled(weight: QuantizedWeight | PackedWeight) -> QuantizedWeight:
    rows = weight.packed if isinstance(weight, PackedWeight) else weight.values
    every = slice(None, None, max(1, len(rows) // ROWS))
    of_scales, block = every, block_shape(weight.args)
    if block is not None:
        every, of_scales = slice(0, block[0]), slice(0, 1)
    elif weight.args.strategy == QuantizationStrategy.TENSOR:
        of_scales = slice(None)
    scale, zero_point = weight.scale[of_scales], weight.zero_point[of_scales]
    if isinstance(weight, PackedWeight):
        shape = (len(rows[every]), weight.shape[1])
        return replace(weight, packed=rows[every], shape=shape, scale=scale, zero_point=zero_point).unpack()
    return replace(weight, values=rows[every], scale=scale, zero_point=zero_point)


def _counted(values: Tensor) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values.cpu(), BINS, low, high) if high > low else torch.tensor([float(values.numel())])
    return {"low": low, "high": high, "counts": counts.int().tolist()}
