"""AutoAWQ's GEMM layout: 4 bits, a zero point and a float16 scale for each group.

A layer has ``qweight`` (in, out / 8) and ``qzeros`` (groups, out / 8), int32, and ``scales`` (groups, out), float16;
the weight is ``(q - zero) * scale``. The eight outputs that share a word stand in it in the order 0, 2, 4, 6, 1, 3, 5,
7.
https://github.com/casper-hansen/AutoAWQ, Lin et al., 2023, https://arxiv.org/abs/2306.00978.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bitpress.checkpoints.formats.layer import Layer, check_weights_only
from bitpress.checkpoints.formats.words import from_words, to_words
from bitpress.errors import BitpressError
from bitpress.quantization import QuantizedWeight

BITS = 4
POINTS = ("qweight",)
GRID = ("qzeros", "scales")
_TOGETHER = 32 // BITS
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BACK = tuple(_ORDER.index(i) for i in range(_TOGETHER))


def check(layer: Layer) -> None:
    """Refuse a layer that the format does not hold.

    Raises:
        BitpressError: names the layer, its scheme and the way out.
    """
    check_weights_only(layer, "awq")
    if layer.args.num_bits != BITS:
        raise layer.refusal("awq", 'it has 4 bits only. format="gptq" has 2, 3, 4 and 8.')
    if layer.shape[0] % _TOGETHER:
        raise layer.refusal("awq", f"eight outputs share a word, and {layer.shape[0]} are no multiple of 8: ignore it.")


def to_tensors(layer: Layer, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What is stored of a weight.

    Args:
        layer: that it is of.
        weight: the weight, with scales in float16.
    """
    return {
        "qweight": _interleaved(weight.values.T),
        "qzeros": _interleaved(layer.per_group(weight.zero_point).T),
        "scales": layer.per_group(weight.scale).T.contiguous(),
    }


def config(layers: Sequence[Layer], dense: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config``.

    Args:
        layers: of one group size.
        dense: names of the linear layers that are not quantized.

    Raises:
        BitpressError: readers would take a quantized layer for a dense one, because of its name.
    """
    for name in dense:
        taken = next((layer.name for layer in layers if name in layer.name), None)
        if taken is not None:
            raise BitpressError(
                f"{name} is dense and {taken} is quantized: awq's readers find the first name in the second, and would "
                'leave both dense. Use format="gptq".'
            )
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": layers[0].group_size,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": list(dense) or None,
    }


def shape_of(stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Rows, columns, groups and bits of a layer, by the shapes of its tensors."""
    columns, words = stored["qweight"]
    return words * _TOGETHER, columns, stored["scales"][0], BITS


def points(layer: Layer, stored: Mapping[str, Tensor]) -> Tensor:
    """Signed integers (out, in), int8."""
    return _apart(stored["qweight"], layer.shape[0]).T.contiguous()


def grid(layer: Layer, stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scales, and signed zero points, int8: (out, groups) each."""
    return stored["scales"].T.contiguous(), _apart(stored["qzeros"], layer.shape[0]).T.contiguous()


def _interleaved(values: Tensor) -> Tensor:
    ordered = values.unflatten(-1, (-1, _TOGETHER))[..., _ORDER].flatten(-2)
    return to_words(ordered, BITS)


def _apart(words: Tensor, count: int) -> Tensor:
    eights: Tensor = from_words(words, BITS, count).unflatten(-1, (-1, _TOGETHER))
    return eights[..., _BACK].flatten(-2)
