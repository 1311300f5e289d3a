"""The safetensors formats to convert to: what each holds of a layer, and what its config says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoints.formats import awq, compressed, gguf, gptq
from bitpress.checkpoints.formats.layer import Layer
from bitpress.checkpoints.formats.opening import COMPRESSED, Checkpoint
from bitpress.checkpoints.formats.rounding import Rounding
from bitpress.quantization import QuantizedWeight

_CHECKS: dict[str, Callable[[Layer], Any]] = {
    COMPRESSED: lambda _: None,
    "awq": awq.check,
    "gptq": gptq.check,
    "gguf": gguf.block_type,
}


@dataclass(frozen=True)
class Target:
    """A format, for one checkpoint.

    Attributes:
        tensors: what is stored of a layer's weight, whose scales have the format's dtype.
        config: the ``quantization_config``.
        rounding: of the scales.
    """

    tensors: Callable[[Layer, QuantizedWeight], dict[str, Tensor]]
    config: dict[str, Any]
    rounding: Rounding

    @classmethod
    def of(cls, kind: str, checkpoint: Checkpoint) -> "Target":
        """Settle it.

        Raises:
            BitpressError: the format does not hold a layer, or not all of them together; names it.
        """
        layers = list(checkpoint.layers.values())
        check_layers(kind, layers)
        if kind == COMPRESSED:
            config = compressed.config(checkpoint.structure, checkpoint.layers)
            return cls(compressed.to_tensors, config, Rounding(checkpoint.dtype))
        dense = checkpoint.structure.dense_linears(checkpoint.layers)
        if kind == "awq":
            return cls(awq.to_tensors, awq.config(layers, dense), Rounding(torch.float16))
        config = gptq.config(layers, dense, checkpoint.zeros)
        to_tensors = partial(gptq.to_tensors, checkpoint_format=config["checkpoint_format"])
        return cls(to_tensors, config, Rounding(torch.float16))


def check_layers(kind: str, layers: Sequence[Layer]) -> None:
    """Refuse layers that a format does not hold, each or all together.

    Raises:
        BitpressError: names one, its scheme and the way out.
    """
    for layer in layers:
        _CHECKS[kind](layer)
    if kind not in ("awq", "gptq") or not layers:
        return
    first = layers[0]
    for layer in layers:
        same = layer.args.num_bits == first.args.num_bits
        if not same or layer.group_size != first.group_size:
            raise layer.refusal(
                kind,
                f"{first.name} has {first.args.num_bits} bits and groups of {first.group}, and this format has one "
                "scheme for all layers. compressed-tensors holds several.",
            )
