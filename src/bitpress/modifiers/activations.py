"""Which activations are quantized: of layers, and of attention; refused before anything is computed if nobody could."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import get_head_dim, get_num_attn_heads, get_num_kv_heads, is_match
from torch import Tensor, nn

from bitpress.checkpoints.readers import is_read_by_its_parent
from bitpress.errors import BitpressError
from bitpress.models.experts import ExpertLinear, find_layer
from bitpress.models.linears import in_features, weight_matrix
from bitpress.models.taps import OUTPUT, Tap, cached_attentions
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.state import State
from bitpress.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    check_activations,
    is_static,
    quantizes_activations,
    static_tensors,
)
from bitpress.quantization.activations import OF_ATTENTION, check_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionScheme:
    """How the states of one attention are quantized.

    Attributes:
        scheme: its ``input_activations`` are the grid of keys and values (and queries).
        queries: True if the attention itself is quantized, False if only its cache is.
    """

    scheme: QuantizationScheme
    queries: bool

    @property
    def args(self) -> QuantizationArgs:
        """The grid."""
        assert self.scheme.input_activations is not None  # noqa: S101
        return self.scheme.input_activations

    @property
    def states(self) -> tuple[str, ...]:
        """What is quantized."""
        return ("q", "k", "v") if self.queries else ("k", "v")


def is_of_attention(group: QuantizationScheme) -> bool:
    """True for a config group of attention modules: it has a grid for activations, and none for weights."""
    return group.weights is None and group.input_activations is not None


def check_group(label: str, group: QuantizationScheme) -> None:
    """Refuse activations of a config group that no reader follows.

    Raises:
        BitpressError: names the group and the field.
    """
    for field in ("input_activations", "output_activations"):
        args = getattr(group, field)
        if args is None:
            continue
        try:
            check_activations(args, OF_ATTENTION if is_of_attention(group) else (QuantizationStrategy.TENSOR,))
            if field == "output_activations" and args.dynamic == "local":
                raise BitpressError('dynamic="local" is for input_activations.')
        except BitpressError as error:
            raise BitpressError(f"config group {label!r}: {field}: {error}") from error


def readable_activations(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> dict[str, QuantizationScheme]:
    """The schemes without the activations that readers would leave as they are, with a warning of those.

    Raises:
        BitpressError: nothing would be left of the activations, or a layer's forward is not its class's.
    """
    readable = dict(schemes)
    left: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        layer = find_layer(model, name)
        if not quantizes_activations(scheme):
            continue
        if "forward" in layer.__dict__:
            raise BitpressError(
                f"the forward of {name} has been replaced (accelerate does it to offload layers), and the one that "
                "quantizes activations would take its place: load the model without offloading."
            )
        if not isinstance(layer, nn.Linear) or is_read_by_its_parent(model, name):
            left.setdefault(type(layer).__name__, []).append(name)
            readable[name] = _with(scheme, input_activations=None, output_activations=None)
        elif isinstance(layer, ExpertLinear) and scheme.output_activations is not None:
            left.setdefault("experts (their outputs)", []).append(name)
            readable[name] = _with(scheme, output_activations=None)
    if left and not any(quantizes_activations(scheme) for scheme in readable.values()):
        kind, names = next(iter(left.items()))
        raise BitpressError(
            f"no reader quantizes the activations of {names[0]} ({kind}), nor of any other layer of "
            f"{type(model).__name__} that is targeted: use a scheme of weights only."
        )
    of_experts = [
        n for n, s in readable.items() if s.input_activations and isinstance(find_layer(model, n), ExpertLinear)
    ]
    if of_experts:
        logger.warning(
            "servers will quantize the inputs of the experts (%d layers, %s first); here and in transformers, which "
            "compute all experts at once, these stay as they are. Evaluate what is served.",
            len(of_experts), of_experts[0],
        )  # fmt: skip
    for kind, names in left.items():
        logger.warning(
            "%d layers (%s; %s) keep their activations as they are: no reader of the checkpoint quantizes these. A "
            "scheme of weights alone for them says the same.",
            len(names), kind, names[0],
        )  # fmt: skip
    return readable


def _with(scheme: QuantizationScheme, **fields: Any) -> QuantizationScheme:
    return scheme.model_copy(update=fields)


def check_widths(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> None:
    """Refuse groups of activations that do not divide their columns.

    Raises:
        BitpressError: names the first such layer.
    """
    for name, scheme in schemes.items():
        layer = find_layer(model, name)
        widths = {"input_activations": in_features(layer), "output_activations": weight_matrix(layer).shape[0]}
        for field, width in widths.items():
            args: QuantizationArgs | None = getattr(scheme, field)
            if args is not None and not check_groups(args, width):
                raise BitpressError(
                    f"{field}: group_size {args.group_size} does not divide the {width} columns of {name}. Choose a "
                    "size that does, or add the layer to ignore."
                )


def attention_schemes(
    model: nn.Module,
    kv_cache_scheme: QuantizationArgs | None,
    groups: Mapping[str, QuantizationScheme],
    ignore: list[str],
) -> dict[str, AttentionScheme]:
    """The attentions whose states are quantized, by name. A config group that targets one has it, not the cache's.

    Raises:
        BitpressError: there are none that compressed-tensors can hook, or a grid that it does not compute.
    """
    if kv_cache_scheme is None and not groups:
        return {}
    found = cached_attentions(model) if hasattr(model, "config") else {}
    if not found:
        kinds = sorted({type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()})
        raise BitpressError(
            f"{type(model).__name__} has no attention whose cache compressed-tensors can quantize: one of a "
            "transformers model, with k_proj and v_proj and an argument past_key_values. "
            f"Its attentions are of class {', '.join(kinds) or '(none)'}."
        )
    _heads(model)
    _check_names(found)
    schemes = _of_groups(groups, found, ignore)
    if kv_cache_scheme is not None:
        try:
            check_activations(kv_cache_scheme, OF_ATTENTION)
        except BitpressError as error:
            raise BitpressError(f"kv_cache_scheme: {error}") from error
        of_cache = QuantizationScheme(targets=sorted({type(m).__name__ for m in found.values()}),
                                      input_activations=kv_cache_scheme)  # fmt: skip
        for name in found:
            schemes.setdefault(name, AttentionScheme(of_cache, queries=False))
    return {name: schemes[name] for name in found if name in schemes}


def resolve_attentions(
    modifiers: Sequence[Modifier], model: nn.Module
) -> tuple[dict[str, AttentionScheme], dict[str, Modifier]]:
    """How the states of each attention are quantized, and the modifier that says so.

    Raises:
        BitpressError: two modifiers say so.
    """
    schemes: dict[str, AttentionScheme] = {}
    owners: dict[str, Modifier] = {}
    for modifier in modifiers:
        for name, scheme in modifier.resolve_attentions(model).items():
            if name in schemes:
                raise BitpressError(
                    f"{type(owners[name]).__name__} and {type(modifier).__name__} both quantize the states of {name}: "
                    "state kv_cache_scheme, or the config group of attention, in one of them."
                )
            schemes[name], owners[name] = scheme, modifier
    return schemes, owners


def _check_names(attentions: Mapping[str, nn.Module]) -> None:
    for name, module in attentions.items():
        taken = next((f"{state}_scale" for state in "qkv" if hasattr(module, f"{state}_scale")), None)
        if taken is not None:
            raise BitpressError(
                f"the states of {name} cannot be quantized: {type(module).__name__} has a {taken} of its own, where "
                "compressed-tensors keeps its scale."
            )


def _of_groups(
    groups: Mapping[str, QuantizationScheme], found: Mapping[str, nn.Module], ignore: list[str]
) -> dict[str, AttentionScheme]:
    schemes: dict[str, AttentionScheme] = {}
    for label, group in groups.items():
        check_group(label, group)
        matched = [n for n, m in found.items() if is_match(n, m, group.targets) and not is_match(n, m, ignore)]
        if not matched:
            kinds = sorted({type(module).__name__ for module in found.values()})
            raise BitpressError(
                f"config group {label!r} has no weights, and its targets {group.targets} match no attention "
                f"({', '.join(kinds)}): give it weights=, or targets that are attention modules."
            )
        for name in matched:
            schemes.setdefault(name, AttentionScheme(group, queries=True))
    left = [name for name in found if name not in schemes]
    if groups and left:
        raise BitpressError(
            f"{left[0]} is in no config group, though others of its kind are: compressed-tensors quantizes the "
            f"attention of all of a model or of none. Give {', '.join(groups)} targets that match it too."
        )
    return schemes


def make_taps(
    model: nn.Module, schemes: Mapping[str, QuantizationScheme], attentions: Mapping[str, AttentionScheme]
) -> dict[str, Tap]:
    """A tap wherever a static scale needs a range that is not of a layer's input, and at all states of attention.

    Where those are dynamic, the dry run with its hooks shows that the model takes compressed-tensors' cache.
    """
    taps = [Tap(name, OUTPUT) for name, scheme in schemes.items() if is_static(scheme.output_activations)]
    for name, attention in attentions.items():
        per_head = attention.args.strategy == QuantizationStrategy.ATTN_HEAD
        of_queries, of_cache = _heads(model) if per_head else (1, 1)
        taps += [Tap(name, state, of_queries if state == "q" else of_cache) for state in attention.states]
    return {tap.name: tap for tap in taps}


def _heads(model: Any) -> tuple[int, int]:
    """Heads of queries, and of keys and values, as compressed-tensors finds them in a model's config.

    Raises:
        BitpressError: it does not, and so it could not load the checkpoint.
    """
    config = model.config.get_text_config(decoder=True)
    try:
        get_head_dim(config)
        return get_num_attn_heads(config), get_num_kv_heads(config)
    except Exception as error:  # whatever it is, it would end the load of the checkpoint
        what = str(error).split(".")[0]
        raise BitpressError(
            f"the states of {type(model).__name__}'s attention cannot be quantized: compressed-tensors could not load "
            f"the checkpoint ({what})."
        ) from error


def check_measured(names: Sequence[str], modifier: Modifier, what: str) -> None:
    """Refuse static scales of places that calibration has not seen.

    Raises:
        BitpressError: names the first.
    """
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise BitpressError(
            f"{type(modifier).__name__}: the scale of {names[0]}{more} is static, but {what}. Use dynamic=True, or "
            "ignore it."
        )


def expected_activations(state: State) -> dict[str, dict[str, Tensor]]:
    """The tensors of static activations as they will be, of any values, by the name of layer or attention."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, scheme in state.schemes.items():
        if is_static(scheme.input_activations):
            found.setdefault(name, {}).update(_any_tensors("input", scheme.input_activations, 1))
    for tap in state.taps.values():
        attention = state.attentions.get(tap.owner)
        args = state.schemes[tap.owner].output_activations if attention is None else attention.args
        if is_static(args):
            found.setdefault(tap.owner, {}).update(_any_tensors(tap.base, args, tap.in_features))
    return found


def _any_tensors(base: str, args: Any, count: int) -> dict[str, Tensor]:
    return static_tensors(base, -torch.ones(count), torch.ones(count), args, torch.float32)
