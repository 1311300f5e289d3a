"""Weights in ggml's blocks of 32 values of a row, each with its scale.

A block of Q4_0 is a scale d and 32 codes q of 4 bits, for ``(q - 8) d``; of Q4_1 d, a minimum m, and the codes, for
``q d + m``; of Q8_0 d and 32 signed bytes, for ``q d``. d and m are float16. The byte j of the codes of 4 bits has
those of the values j and j + 16. https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

import torch
from torch import Tensor

from bitpress.checkpoints.formats.layer import Layer, check_weights_only
from bitpress.checkpoints.formats.rounding import Rounding
from bitpress.quantization import QuantizedWeight

BLOCK = 32
# Bytes of a block, by its type.
SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_HALF = 8


def block_type(layer: Layer) -> str:
    """The type whose blocks hold a layer's points.

    Groups of a multiple of 32 have their scale in several blocks; grids of fewer bits are parts of one of 4 or 8.

    Raises:
        BitpressError: there is none; names the layer, its scheme and the way out.
    """
    check_weights_only(layer, "gguf")
    if layer.group % BLOCK:
        raise layer.refusal("gguf", "a block has 32 values, and the group is no multiple of it: use group_size 32.")
    if layer.args.num_bits <= 4:
        return "Q4_0" if layer.args.symmetric else "Q4_1"
    if layer.args.symmetric:
        return "Q8_0"
    raise layer.refusal("gguf", "only grids of up to 4 bits have zero points there: use symmetric=True.")


def to_blocks(layer: Layer, weight: QuantizedWeight, scales: Rounding, minima: Rounding) -> Tensor:
    """The bytes of a weight: (out, in / 32 * bytes of a block), uint8.

    Args:
        layer: that it is of.
        weight: the weight.
        scales: makes scales float16.
        minima: makes minima float16.
    """
    kind = block_type(layer)
    step = scales(layer.name, layer.per_group(weight.scale))
    repeats = layer.group // BLOCK
    parts = [_bytes(step.repeat_interleave(repeats, 1))]
    if kind == "Q4_1":
        # In float64: the product of a scale and a zero point has more digits than either.
        wide = step.double()
        minimum = minima(layer.name, -(layer.per_group(weight.zero_point).double() + _HALF) * wide, wide)
        parts.append(_bytes(minimum.repeat_interleave(repeats, 1)))
    values = weight.values.unflatten(1, (-1, BLOCK))
    if kind == "Q8_0":
        parts.append(values.view(torch.uint8))
    else:
        codes = (values + _HALF).view(torch.uint8)
        parts.append(codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4)
    return torch.cat(parts, -1).flatten(1)


def _bytes(halves: Tensor) -> Tensor:
    return halves.contiguous().unsqueeze(-1).view(torch.uint8)
