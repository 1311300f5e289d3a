"""The ``quantization_config`` of a checkpoint, in the words of compressed-tensors."""

from collections.abc import Mapping
from typing import Any

import compressed_tensors
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.utils import is_match
from torch import nn

from bitpress.models.linears import is_linear
from bitpress.quantization import QuantizationScheme

FORMAT = CompressionFormat.pack_quantized.value


def quantization_config(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The config that makes every reader give ``layers``, and no others, their schemes.

    One scheme keeps the targets it was stated with, and the layers that they match beyond ``layers`` are ignored by
    name. Several schemes name their layers, so that no reader's order of precedence matters.
    """
    groups: list[tuple[QuantizationScheme, list[str]]] = []
    for name, module in layers.items():
        scheme: QuantizationScheme = module.quantization_scheme
        for known, names in groups:
            if known.weights == scheme.weights:
                names.append(name)
                break
        else:
            groups.append((scheme, [name]))
    ignore: list[str] = []
    stated = list(groups[0][0].targets)
    if len(groups) == 1 and all(is_match(n, m, stated) for n, m in layers.items()):
        ignore = [n for n, m in model.named_modules() if n not in layers and _is_read_as_linear(n, m, stated)]
        targets = [stated]
    else:
        targets = [names for _, names in groups]
    config = QuantizationConfig(
        config_groups={
            f"group_{i}": scheme.model_copy(update={"targets": names, "format": FORMAT})
            for i, ((scheme, _), names) in enumerate(zip(groups, targets, strict=True))
        },
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    dumped = config.model_dump(mode="json")
    return {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}, **dumped}


def _is_read_as_linear(name: str, module: nn.Module, targets: list[str]) -> bool:
    # Conv1D too: stored dense, it must not be targeted, or compressed-tensors 0.17 refuses to load the checkpoint.
    return (is_linear(module) or isinstance(module, nn.Embedding)) and is_match(name, module, targets)
