"""The ``quantization_config`` of a checkpoint, in the words of compressed-tensors."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import compressed_tensors
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.utils import is_match
from torch import nn

from bitpress.checkpoints.attached import quantizes_queries, scheme_of
from bitpress.checkpoints.experts import StoredExperts, expert_targets
from bitpress.models.experts import named_layers
from bitpress.models.linears import is_linear
from bitpress.quantization import QuantizationArgs, QuantizationScheme, stored_format


def quantization_config(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    apart: Sequence[StoredExperts] = (),
    whole: Sequence[StoredExperts] = (),
    attentions: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """The config that makes every reader give ``layers``, and no others, their schemes.

    One scheme keeps the targets it was stated with, and the layers that they match beyond ``layers`` are ignored by
    name. Several schemes name their layers, so that no reader's order of precedence matters. Experts are named by
    patterns: those that are stored ``apart`` have one scheme, those that are stored ``whole`` none. Each group says its
    format; if they differ, the format of all is "mixed-precision".
    """
    of_experts = {name for s in (*apart, *whole) for name in s.names}
    patterns = expert_targets(apart) if have_one_scheme(_layers_of(apart)) else []
    groups: list[tuple[QuantizationScheme, list[str]]] = []
    for name, module in layers.items():
        scheme = scheme_of(module)
        for known, names in groups:
            if _same_but_for_targets(known, scheme):
                names.append(name)
                break
        else:
            groups.append((scheme, [name]))
    ignore: list[str] = []
    # A target that is there for other models would make readers warn.
    stated = [
        t for scheme, _ in groups[:1] for t in scheme.targets if any(is_match(n, m, t) for n, m in layers.items())
    ]
    if len(groups) == 1 and all(is_match(n, m, stated) for n, m in layers.items()):
        dense = [n for n, m in named_layers(model) if n not in layers and _is_read_as_linear(n, m, stated)]
        ignore = [n for n in dense if n not in of_experts] + _owners(dense, whole)
        targets = [stated]
    else:
        targets = [_with_patterns(names, patterns, of_experts) for _, names in groups]
    formats = [stored_format(scheme) for scheme, _ in groups]
    schemes = [
        scheme.model_copy(update={"targets": names, "format": each})
        for (scheme, _), names, each in zip(groups, targets, formats, strict=True)
    ]
    of_cache, of_attention = _states(attentions or {})
    config = QuantizationConfig(
        # Attention first: of the groups that match a module the first counts.
        config_groups={f"group_{i}": scheme for i, scheme in enumerate([*of_attention, *schemes])},
        kv_cache_scheme=of_cache,
        format=_format_of_all(formats),
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    dumped = config.model_dump(mode="json")
    return {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}, **dumped}


def _format_of_all(formats: Sequence[str]) -> str:
    if len(set(formats)) > 1:
        return str(CompressionFormat.mixed_precision.value)
    return formats[0] if formats else str(CompressionFormat.dense.value)


def _states(attentions: Mapping[str, nn.Module]) -> tuple[QuantizationArgs | None, list[QuantizationScheme]]:
    """The scheme of the cache, and the groups of attentions that are quantized themselves."""
    of_cache: QuantizationArgs | None = None
    groups: list[QuantizationScheme] = []
    for name, attention in attentions.items():
        scheme = scheme_of(attention)
        if not quantizes_queries(attention):
            of_cache = scheme.input_activations
            continue
        known = next((g for g in groups if g.input_activations == scheme.input_activations), None)
        if known is None:
            groups.append(scheme.model_copy(update={"targets": [name]}))
        else:
            known.targets.append(name)
    return of_cache, groups


def _same_but_for_targets(one: QuantizationScheme, other: QuantizationScheme) -> bool:
    """True for schemes that differ in nothing but their targets."""
    same: bool = one.model_copy(update={"targets": []}) == other.model_copy(update={"targets": []})
    return same


def _with_patterns(names: list[str], patterns: list[str], of_experts: Collection[str]) -> list[str]:
    """Names of a group's layers, those of experts as patterns if there are any."""
    if not patterns or not any(name in of_experts for name in names):
        return names
    return [*(name for name in names if name not in of_experts), *patterns]


def have_one_scheme(layers: Sequence[nn.Module]) -> bool:
    """True if there are layers, and all of them have the same scheme."""
    schemes = [scheme_of(layer) for layer in layers]
    return bool(schemes) and all(_same_but_for_targets(scheme, schemes[0]) for scheme in schemes)


def _layers_of(stored: Sequence[StoredExperts]) -> list[nn.Module]:
    return [layer for s in stored for layer in s.experts.layers.values()]


def _owners(dense: Collection[str], whole: Sequence[StoredExperts]) -> list[str]:
    return [rf"re:{re.escape(s.owner)}\..*" for s in whole if any(name in dense for name in s.names)]


def _is_read_as_linear(name: str, module: nn.Module, targets: list[str]) -> bool:
    # Conv1D too: stored dense, it must not be targeted, or compressed-tensors 0.17 refuses to load the checkpoint.
    return (is_linear(module) or isinstance(module, nn.Embedding)) and is_match(name, module, targets)
