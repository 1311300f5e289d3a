"""Which layers absorb a scale for which: AWQMapping, and the registry of model families."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any

from compressed_tensors.utils import is_match
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.discovery import Discovery
from bitpress.models.experts import ExpertLinear
from bitpress.models.linears import has_columns
from bitpress.models.proofs import Claim
from bitpress.models.smoothing import out_channels


@dataclass(frozen=True)
class AWQMapping:
    """Dividing the output channels of ``smooth_layer`` and multiplying the inputs of ``balance_layers`` cancels out.

    Attributes:
        smooth_layer: name or ``re:`` pattern of the norm or linear layer that runs before.
        balance_layers: names or ``re:`` patterns of all layers that its output goes to.
        activation_hook_target: taken, and not needed: the inputs of the balance layers themselves are measured.
    """

    smooth_layer: str
    balance_layers: Sequence[str]
    activation_hook_target: InitVar[str | None] = None

    def __post_init__(self, activation_hook_target: str | None) -> None:
        """One balance layer may be given without a list."""
        if isinstance(self.balance_layers, str):
            object.__setattr__(self, "balance_layers", [self.balance_layers])

    def __str__(self) -> str:
        return f"AWQMapping({self.smooth_layer!r}, {list(self.balance_layers)!r})"


@dataclass
class ResolvedMapping:
    """A mapping with the layers of one block.

    Attributes:
        mapping: what it was resolved from.
        smooth_name: the smooth layer's name in the model.
        smooth: the smooth layer.
        balance: the balance layers by name.
        source: who stated the mapping: "user", "registry" or "discovery".
        channel_map: (in,), int64: the smooth layer's channel that feeds each input; known once proven.
        difference: what the proof measured.
        power: of a scale at the smooth layer's output when it arrives: 2 behind a squared ReLU.
    """

    mapping: AWQMapping
    smooth_name: str
    smooth: nn.Module
    balance: dict[str, nn.Module]
    source: str
    channel_map: Tensor | None = None
    difference: float = float("nan")
    power: int = 1

    def kind(self, block: Block) -> tuple[Any, ...]:
        """Equal for the same mapping in blocks of one structure, and of other experts."""
        names = (self.smooth_name, *self.balance)
        return tuple(
            (_any_expert(n.removeprefix(block.name), m), *(tuple(p.shape) for p in m.parameters(recurse=False)))
            for n, m in zip(names, self._modules(), strict=True)
        )

    def claim(self) -> Claim:
        """What is to be proven."""
        return Claim(self.smooth, list(self.balance.values()), self.channel_map, self.power)

    def moved(self, source: str, block: Block, modules: Mapping[str, nn.Module]) -> "ResolvedMapping":
        """The same mapping in another block (its ``modules`` by name) of the structure of block ``source``."""
        names = [block.name + name.removeprefix(source) for name in (self.smooth_name, *self.balance)]
        mapping = AWQMapping(names[0], names[1:])
        balance = {name: modules[name] for name in names[1:]}
        return replace(self, mapping=mapping, smooth_name=names[0], smooth=modules[names[0]], balance=balance)

    @classmethod
    def discovered(cls, found: Discovery, modules: Mapping[str, nn.Module]) -> "ResolvedMapping":
        """A mapping that running a block found; its ``modules`` by name."""
        balance = {name: modules[name] for name in found.balance}
        mapping = AWQMapping(found.smooth, list(found.balance))
        proof = found.proof
        smooth = modules[found.smooth]
        return cls(
            mapping, found.smooth, smooth, balance, "discovery", proof.channel_map, proof.difference, proof.power
        )

    def _modules(self) -> list[nn.Module]:
        return [self.smooth, *self.balance.values()]


def _any_expert(name: str, module: nn.Module) -> str:
    if not isinstance(module, ExpertLinear):
        return name
    return f"{name.removesuffix(module.local)}*.{module.projection.part}"


MappingsOfConfig = Callable[[Any], Sequence[AWQMapping]]


@dataclass(frozen=True)
class _Entry:
    mappings: Sequence[AWQMapping] | MappingsOfConfig
    why: str


_REGISTRY: dict[str, _Entry] = {}
# Mappings are discovered, so that a family is entered here only where one that holds is not to be used.
_EXCLUDED: dict[str, list[tuple[AWQMapping, str]]] = {}


def register_mappings(class_name: str, mappings: Sequence[AWQMapping] | MappingsOfConfig, why: str = "") -> None:
    """State the mappings of a model family, where those that discovery finds are not the ones to use.

    Args:
        class_name: of the model, for instance "LlamaForCausalLM". It serves the family's other classes too
            ("LlamaModel", "LlamaForSequenceClassification").
        mappings: in the order in which they are solved, or a function of the model's config that gives them. A mapping
            that matches nothing in a block is passed over; one that matches and fails its proof is an error.
        why: what is wrong with the discovered ones, for ``bitpress mappings`` to tell.
    """
    _REGISTRY[class_name] = _Entry(mappings, why)


def exclude_mapping(class_name: str, mapping: AWQMapping, why: str) -> None:
    """Keep discovery from using a mapping of a family: one that holds, but makes the compressed model worse.

    Args:
        class_name: of the model; see :func:`register_mappings`.
        mapping: by patterns.
        why: for ``bitpress mappings`` to tell.
    """
    _EXCLUDED.setdefault(_family(class_name), []).append((mapping, why))


def why_excluded(model: nn.Module, found: ResolvedMapping) -> str | None:
    """Why a mapping that was discovered is not to be used on this model; None if it is."""
    layers = {found.smooth_name: found.smooth, **found.balance}
    for mapping, why in _EXCLUDED.get(_family(type(model).__name__), []):
        smooth = is_match(found.smooth_name, layers[found.smooth_name], mapping.smooth_layer)
        if smooth and all(is_match(n, m, list(mapping.balance_layers)) for n, m in found.balance.items()):
            return why
    return None


def registered_mappings(model: nn.Module) -> list[AWQMapping] | None:
    """The mappings of the model's family, or None if the registry has none."""
    entry = _entry(model)
    if entry is None:
        return None
    stated = entry.mappings
    return list(stated(getattr(model, "config", None)) if callable(stated) else stated)


def reason_for_registration(model: nn.Module) -> str:
    """Why the model's family is registered; "" if it is not, or nobody said."""
    entry = _entry(model)
    return entry.why if entry is not None else ""


def _entry(model: nn.Module) -> _Entry | None:
    name = type(model).__name__
    families = {_family(known): known for known in _REGISTRY}
    return _REGISTRY.get(name) or _REGISTRY.get(families.get(_family(name), ""))


def _family(class_name: str) -> str:
    """What a family's classes have in common: "Llama" of "LlamaForCausalLM", "GPT2" of "GPT2LMHeadModel"."""
    return re.split(r"For(?=[A-Z])|LMHead|DoubleHeads|Model$|PreTrained", class_name, maxsplit=1)[0]


def resolve_mapping(mapping: AWQMapping, block: Block, source: str) -> list[ResolvedMapping]:
    """Find a mapping's layers in one block: each smooth layer with the balance layers nearest to it.

    Empty where the block has no such smooth layer, or none of the balance layers.

    Raises:
        BitpressError: only some of the balance patterns match in the block.
    """
    modules = list(block.named_modules())
    linears = {name: module for name, module in modules if has_columns(module)}
    smooths = [(n, m) for n, m in modules if is_match(n, m, mapping.smooth_layer) and out_channels(m) is not None]
    missing = [p for p in mapping.balance_layers if not any(is_match(n, m, p) for n, m in linears.items())]
    if not smooths or len(missing) == len(mapping.balance_layers):
        return []
    if missing:
        raise BitpressError(f"{mapping}: {missing[0]!r} matches no linear layer of {block.label}, the others do.")
    resolved = []
    for name, module in smooths:
        balance = _nearest_balance(name, mapping.balance_layers, linears, block.name)
        if balance:
            resolved.append(ResolvedMapping(mapping, name, module, balance, source))
    return resolved


def _of_same_expert(smooth: nn.Module | None, layer: nn.Module) -> bool:
    if isinstance(smooth, ExpertLinear) and isinstance(layer, ExpertLinear):
        return smooth.expert == layer.expert
    return True


def _nearest_balance(
    smooth: str, patterns: Sequence[str], linears: dict[str, nn.Module], block: str
) -> dict[str, nn.Module]:
    """The matches of all patterns below the nearest ancestor of the smooth layer that has one of each."""
    ancestor = smooth
    beside = {n: m for n, m in linears.items() if n != smooth and _of_same_expert(linears.get(smooth), m)}
    while True:
        ancestor = ancestor.rpartition(".")[0]
        inside = {n: m for n, m in beside.items() if not ancestor or n.startswith(f"{ancestor}.")}
        if all(any(is_match(n, m, p) for n, m in inside.items()) for p in patterns):
            return {n: m for n, m in inside.items() if is_match(n, m, list(patterns))}
        if len(ancestor) <= len(block):
            return {}


for _name in ("Gemma3ForCausalLM", "Gemma3TextModel"):
    exclude_mapping(
        _name,
        AWQMapping("re:.*input_layernorm$", ["re:.*(q|k|v)_proj$"]),
        "queries and keys are normed behind these layers, so that the error at their outputs is not what counts: "
        "smoothed, the model was reported to be worse than round-to-nearest (llm-compressor issue 2522)",
    )
