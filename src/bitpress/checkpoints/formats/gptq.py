"""AutoGPTQ's layout: 2, 3, 4 or 8 bits, packed along a layer's inputs.

A layer has ``qweight`` (in * bits / 32, out), ``qzeros`` (groups, out * bits / 32) and ``g_idx`` (in,), the group of
each input, all int32, and ``scales`` (groups, out), float16; the weight is ``(q - zero) * scale``. The format "gptq"
has zero points less one, "gptq_v2" as they are. A zero point of 0 makes "gptq" ambiguous: some readers add the one to
the words, with carries from one zero point to the next, others to each zero point, without. So "gptq" is written where
there is none, which every reader takes, and "gptq_v2" else.
https://github.com/ModelCloud/GPTQModel, Frantar et al., 2022, https://arxiv.org/abs/2210.17323.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoints.formats.layer import Layer, check_weights_only
from bitpress.checkpoints.formats.words import from_words, to_words
from bitpress.quantization import QuantizedWeight

BITS = (2, 3, 4, 8)
POINTS = ("qweight",)
GRID = ("qzeros", "scales", "g_idx")
_WORD = 32
LESS_ONE = "gptq"
AS_IT_IS = "gptq_v2"


def check(layer: Layer) -> None:
    """Refuse a layer that the format does not hold.

    Raises:
        BitpressError: names the layer, its scheme and the way out.
    """
    check_weights_only(layer, "gptq")
    if layer.args.num_bits not in BITS:
        raise layer.refusal("gptq", "it has 2, 3, 4 or 8 bits.")
    if layer.shape[0] % _WORD or layer.shape[1] % _WORD:
        raise layer.refusal("gptq", "its readers want multiples of 32 both ways: ignore the layer.")


def to_tensors(layer: Layer, weight: QuantizedWeight, checkpoint_format: str) -> dict[str, Tensor]:
    """What is stored of a weight.

    Args:
        layer: that it is of.
        weight: the weight, with scales in float16.
        checkpoint_format: "gptq" or "gptq_v2".
    """
    bits = layer.args.num_bits
    zeros = layer.per_group(weight.zero_point).T.contiguous()
    if checkpoint_format == LESS_ONE:
        zeros = zeros - 1
    return {
        "qweight": to_words(weight.values, bits).T.contiguous(),
        "qzeros": to_words(zeros, bits),
        "scales": layer.per_group(weight.scale).T.contiguous(),
        "g_idx": _in_order(layer),
    }


def config(layers: Sequence[Layer], dense: Sequence[str], zeros: tuple[int, int]) -> dict[str, Any]:
    """The ``quantization_config``.

    Args:
        layers: of one number of bits and one group size.
        dense: names of the linear layers that are not quantized.
        zeros: the least and the greatest of all signed zero points.
    """
    bits = layers[0].args.num_bits
    stated: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": layers[0].group_size,
        "desc_act": False,
        "sym": zeros == (0, 0),
        "checkpoint_format": AS_IT_IS if zeros[0] == -(1 << (bits - 1)) else LESS_ONE,
        "pack_dtype": "int32",
        "lm_head": any(layer.name.endswith("lm_head") for layer in layers),
    }
    # The head is said above.
    left = [name for name in dense if not name.endswith("lm_head")]
    if left:
        # The first for GPTQModel, the second for transformers; vLLM reads either.
        stated["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
        stated["modules_in_block_to_quantize"] = [[layer.name for layer in layers]]
    return stated


def shape_of(stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Rows, columns, groups and bits of a layer, by the shapes of its tensors."""
    words, rows = stored["qweight"]
    columns = stored["g_idx"][0]
    return rows, columns, stored["scales"][0], words * _WORD // columns


def points(layer: Layer, stored: Mapping[str, Tensor]) -> Tensor:
    """Signed integers (out, in), int8."""
    return from_words(stored["qweight"].T, layer.args.num_bits, layer.shape[1])


def grid(layer: Layer, stored: Mapping[str, Tensor], checkpoint_format: str) -> tuple[Tensor, Tensor]:
    """Scales, and signed zero points, int8: (out, groups) each.

    Raises:
        BitpressError: the layer's columns do not stand in their groups.
    """
    if not torch.equal(stored["g_idx"], _in_order(layer)):
        raise layer.refusal("other formats", "its columns are not sorted by their groups (g_idx, made by desc_act).")
    zeros = from_words(stored["qzeros"], layer.args.num_bits, layer.shape[0]).T.contiguous()
    if checkpoint_format == LESS_ONE:
        half = 1 << (layer.args.num_bits - 1)
        zeros = torch.where(zeros == half - 1, -half, zeros + 1).to(torch.int8)
    return stored["scales"].T.contiguous(), zeros


def _in_order(layer: Layer) -> Tensor:
    return (torch.arange(layer.shape[1]) // layer.group).to(torch.int32)
