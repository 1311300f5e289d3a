"""How experts are stored: one by one and packed where readers take them so, else as the model has them."""

import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy, QuantizationType
from torch import Tensor, nn

from bitpress.checkpoints.attached import scheme_of
from bitpress.models.experts import ExpertLinear, FusedExperts, fused_experts
from bitpress.models.stacks import Projection
from bitpress.quantization import QuantizationScheme, has_global_scale, stored_format
from bitpress.quantization.formats import PACKED

logger = logging.getLogger(__name__)

# A stand-in for an expert's matrix, small and of unequal sides.
_ROWS, _COLUMNS = 4, 6


@dataclass(frozen=True)
class StoredExperts:
    """What a module's experts are called in a checkpoint.

    Attributes:
        owner: the module's name in the model.
        experts: the experts.
        names: of each layer, by its name in the model, without ".weight".
        by_transformers: True if transformers reads them one by one and packed.
        as_layers: True if it puts a linear layer for each in the model, which reads zero points too.
    """

    owner: str
    experts: FusedExperts
    names: Mapping[str, str]
    by_transformers: bool
    as_layers: bool = False

    @property
    def parameters(self) -> list[str]:
        """Names in the model of the parameters that hold the weights of all."""
        fused = dict.fromkeys(p.parameter for p in self.experts.projections)
        return [_within(self.owner, name) for name in fused]

    @property
    def packable(self) -> bool:
        """True if some reader takes them one by one: none does with biases, or where inputs come before outputs."""
        plain = not any(p.transposed for p in self.experts.projections) and all(
            layer.bias is None for layer in self.experts.layers.values()
        )
        single = len(self.experts.projections) == 1
        return self.by_transformers or (plain and not single)


def stored_experts(model: nn.Module) -> list[StoredExperts]:
    """The fused experts of a transformers model, with the names of their layers in its checkpoints.

    The names are those of transformers' own conversion for the family ("w1" in a Mixtral). Families whose checkpoints
    hold the fused parameters themselves have "experts.3.gate_proj", which vLLM's loaders take.
    """
    found = []
    for owner, module in model.named_modules():
        experts = fused_experts(module)
        if experts is None:
            continue
        names = _split_names(model, owner, experts)
        if len(names) < len(experts.layers):
            # transformers remembers only the conversions that the model's checkpoint needed.
            with _conversions_of_the_family(model):
                names = _split_names(model, owner, experts)
        if len(names) == len(experts.layers):
            found.append(StoredExperts(owner, experts, names, by_transformers=True))
        else:
            own = checkpoint_names(model, [_within(owner, local) for local in experts.layers])
            unfused = _is_unfused_by_transformers(module)
            found.append(StoredExperts(owner, experts, own, by_transformers=unfused, as_layers=unfused))
    return found


def _split_names(model: nn.Module, owner: str, experts: FusedExperts) -> dict[str, str]:
    names: dict[str, str] = {}
    for projection in experts.projections:
        names |= _converted(model, owner, experts, projection)
    return names


@contextmanager
def _conversions_of_the_family(model: nn.Module) -> Iterator[None]:
    own = model.__dict__.pop("_weight_conversions", None)
    try:
        yield
    finally:
        if own is not None:
            model.__dict__["_weight_conversions"] = own


def _within(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _converted(model: nn.Module, owner: str, experts: FusedExperts, projection: Projection) -> dict[str, str]:
    """Names that transformers gives the slices of a parameter when it saves; empty if it keeps the parameter whole.

    A parameter that holds its own indices is sent through the conversion, and says where each of them went.
    """
    count = len(experts.module.get_parameter(projection.parameter))
    indices = torch.arange(count * _ROWS * _COLUMNS).view(count, _ROWS, _COLUMNS)
    pieces = _revert(model, {_within(owner, projection.parameter): indices})
    rows = projection.rows
    if rows != slice(None) and rows.step is None:
        rows = slice(_ROWS // 2, None) if rows.start else slice(_ROWS // 2)  # a half of the stand-in
    names = {}
    for local, layer in experts.layers.items():
        if layer.projection is projection:
            matrix = indices[layer.expert].T if projection.transposed else indices[layer.expert]
            name = next((n for n, t in pieces.items() if torch.equal(t, matrix[rows])), None)
            if name is not None:
                names[_within(owner, local)] = name.removesuffix(".weight")
    return names


def checkpoint_names(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """What the layers are called in a compressed checkpoint, by their names in the model: see :func:`tensor_names`."""
    # A renaming may be of ".weight" only.
    names = tensor_names(model, {f"{name}.weight_packed": 2 for name in layers})
    return {name: names[f"{name}.weight_packed"].removesuffix(".weight_packed") for name in layers}


def tensor_names(model: nn.Module, dimensions: Mapping[str, int]) -> dict[str, str]:
    """What tensors are called in a compressed checkpoint, by their names in the model.

    A vision-language model's checkpoint has other prefixes, for instance. What transformers would split or join keeps
    the model's own name: beside packed weights its loader does not join dense ones, and would leave them random.

    Args:
        model: the model.
        dimensions: how many each tensor has, by its name.
    """
    stand_ins = {name: torch.zeros([_ROWS] * count) for name, count in dimensions.items()}
    stored = _revert(model, dict(stand_ins))
    # The first slice of a tensor that is split has its address, but not its shape.
    whole = {(t.data_ptr(), t.shape): name for name, t in stored.items()}
    return {name: whole.get((t.data_ptr(), t.shape), name) for name, t in stand_ins.items()}


def _revert(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers would write for these tensors; nothing where it needs more of the model to tell."""
    try:
        from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415
    except ImportError:
        return tensors
    if not hasattr(model, "config"):
        return tensors
    of_transformers: Any = model
    try:
        reverted: dict[str, Tensor] = revert_weight_conversion(of_transformers, tensors)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
        return {}
    return reverted


@functools.cache
def _unfused_classes() -> frozenset[str]:
    try:
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION  # noqa: PLC0415
    except ImportError:
        return frozenset()
    return frozenset(MODULES_TO_PATCH_FOR_QUANTIZATION)


def _is_unfused_by_transformers(module: nn.Module) -> bool:
    """True if transformers puts one linear layer per expert in its place when it loads a compressed checkpoint."""
    return type(module).__name__ in _unfused_classes()


def choose_packed(
    stored: Sequence[StoredExperts], packed: Mapping[str, Any], *, one_scheme: bool
) -> tuple[list[StoredExperts], list[StoredExperts]]:
    """Experts that are stored one by one and packed, and those that stay whole, with warnings where readers differ.

    Args:
        stored: all of the model's.
        packed: the layers that are quantized and can be packed, by name.
        one_scheme: True if all of these have one scheme.
    """
    complete = [s for s in stored if all(name in packed for name in s.names)]
    # transformers' loader unpacks all experts of a model by one scheme.
    apart = [s for s in complete if s.packable and (one_scheme or not s.by_transformers)]
    whole = [s for s in stored if s not in apart]
    quantized = [s for s in whole if any(name in packed for name in s.names)]
    if quantized:
        logger.warning(
            "the experts of %s%s hold the quantized values but are stored dense: %s. To keep their values, at the same "
            "size, add them to ignore.",
            quantized[0].owner,
            f" and {len(quantized) - 1} more" if len(quantized) > 1 else "",
            "no reader takes experts of this layout packed"
            if not quantized[0].packable
            else "transformers reads packed experts only where all of a module are quantized, by one scheme",
        )
    unread = [s for s in apart if not s.by_transformers]
    if unread:
        logger.warning(
            "the experts (%s) are stored packed, one by one, for vLLM; transformers has no reader for that and would "
            "leave them random without an error: use bitpress.load.",
            type(unread[0].experts.module).__name__,
        )
    fused = [layer for s in apart if s.by_transformers and not s.as_layers for layer in s.experts.layers.values()]
    unfit = next((why for why in map(_why_not_fused, map(scheme_of, fused)) if why), None)
    if unfit:
        logger.warning(
            "the experts are stored %s: vLLM reads them, but transformers up to 5.23 %s. Use bitpress.load, or another "
            "scheme for the experts.",
            *unfit,
        )
    return apart, whole


def _why_not_fused(scheme: QuantizationScheme) -> tuple[str, str] | None:
    """What transformers cannot join to one parameter for all experts, and what it does; None if it can."""
    args = scheme.weights
    fails = "stops with an error"
    if args.type == QuantizationType.INT:
        if not args.symmetric:
            return "with zero points", fails
        return None if stored_format(scheme) == PACKED else ("one integer a byte", fails)
    if has_global_scale(args):
        return "with global scales", "leaves these out, without an error"
    plain = args.strategy in (QuantizationStrategy.TENSOR, QuantizationStrategy.CHANNEL)
    return None if args.num_bits < 8 or plain else ("with several scales a row", fails)


def expert_targets(stored: Sequence[StoredExperts]) -> list[str]:
    """Patterns that match the experts' layers, and nothing else, by their names in the model and in vLLM."""
    tails = dict.fromkeys(s.owner.rpartition(".")[2] for s in stored)
    return [rf"re:.*\.{re.escape(tail)}\.\d+\..*" for tail in tails]


def is_expert(layer: nn.Module) -> bool:
    """True for a layer of fused experts."""
    return isinstance(layer, ExpertLinear)
