"""Which layers absorb a scale for which: AWQMapping, and the registry of model families."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressed_tensors.utils import is_match
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.discovery import Discovery
from bitpress.models.linears import is_linear
from bitpress.models.smoothing import out_channels


@dataclass(frozen=True)
class AWQMapping:
    """Dividing the output channels of ``smooth_layer`` and multiplying the inputs of ``balance_layers`` cancels out.

    Attributes:
        smooth_layer: name or ``re:`` pattern of the norm or linear layer that runs before.
        balance_layers: names or ``re:`` patterns of all layers that its output goes to.
    """

    smooth_layer: str
    balance_layers: Sequence[str]

    def __post_init__(self) -> None:
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
    """

    mapping: AWQMapping
    smooth_name: str
    smooth: nn.Module
    balance: dict[str, nn.Module]
    source: str
    channel_map: Tensor | None = None
    difference: float = float("nan")

    def kind(self, block: Block) -> tuple[Any, ...]:
        """Equal for the same mapping in blocks of one structure."""
        names = (self.smooth_name, *self.balance)
        return tuple(
            (n.removeprefix(block.name), tuple(block_shape(m))) for n, m in zip(names, self._modules(), strict=True)
        )

    def moved(self, source: str, block: Block) -> "ResolvedMapping":
        """The same mapping in another block of the structure of block ``source``."""
        names = [block.name + name.removeprefix(source) for name in (self.smooth_name, *self.balance)]
        modules = dict(block.named_modules())
        mapping = AWQMapping(names[0], names[1:])
        balance = {name: modules[name] for name in names[1:]}
        return replace(self, mapping=mapping, smooth_name=names[0], smooth=modules[names[0]], balance=balance)

    @classmethod
    def discovered(cls, found: Discovery, block: Block) -> "ResolvedMapping":
        """A mapping that running the block found."""
        modules = dict(block.named_modules())
        balance = {name: modules[name] for name in found.balance}
        mapping = AWQMapping(found.smooth, list(found.balance))
        proof = found.proof
        return cls(
            mapping, found.smooth, modules[found.smooth], balance, "discovery", proof.channel_map, proof.difference
        )

    def _modules(self) -> list[nn.Module]:
        return [self.smooth, *self.balance.values()]


def block_shape(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of a module's own parameters."""
    return [tuple(p.shape) for p in module.parameters(recurse=False)]


MappingsOfConfig = Callable[[Any], Sequence[AWQMapping]]
_REGISTRY: dict[str, Sequence[AWQMapping] | MappingsOfConfig] = {}


def register_mappings(class_name: str, mappings: Sequence[AWQMapping] | MappingsOfConfig) -> None:
    """State the mappings of a model family.

    Args:
        class_name: of the model, for instance "LlamaForCausalLM". It serves the family's other classes too
            ("LlamaModel", "LlamaForSequenceClassification").
        mappings: in the order in which they are solved, or a function of the model's config that gives them. A mapping
            that matches nothing in a block is passed over; one that matches and fails its proof is an error.
    """
    _REGISTRY[class_name] = mappings


def registered_mappings(model: nn.Module) -> list[AWQMapping] | None:
    """The mappings of the model's family, or None if the registry has none."""
    name = type(model).__name__
    families = {_family(known): known for known in _REGISTRY}
    found = _REGISTRY.get(name) or _REGISTRY.get(families.get(_family(name), ""))
    if found is None:
        return None
    return list(found(getattr(model, "config", None)) if callable(found) else found)


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
    linears = {name: module for name, module in modules if is_linear(module)}
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


def _nearest_balance(
    smooth: str, patterns: Sequence[str], linears: dict[str, nn.Module], block: str
) -> dict[str, nn.Module]:
    """The matches of all patterns below the nearest ancestor of the smooth layer that has one of each."""
    ancestor = smooth
    while True:
        ancestor = ancestor.rpartition(".")[0]
        inside = {n: m for n, m in linears.items() if n != smooth and (not ancestor or n.startswith(f"{ancestor}."))}
        if all(any(is_match(n, m, p) for n, m in inside.items()) for p in patterns):
            return {n: m for n, m in inside.items() if is_match(n, m, list(patterns))}
        if len(ancestor) <= len(block):
            return {}


_ATTENTION_OUT = AWQMapping("re:.*v_proj$", ["re:.*(o_proj|out_proj)$"])
_QKV = ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]
_GATE_UP = ["re:.*gate_proj$", "re:.*up_proj$"]
_UP_DOWN = AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])

_LLAMA = [
    AWQMapping("re:.*input_layernorm$", _QKV),
    _ATTENTION_OUT,
    AWQMapping("re:.*post_attention_layernorm$", _GATE_UP),
    _UP_DOWN,
]
_GEMMA = [
    AWQMapping("re:.*input_layernorm$", _QKV),
    _ATTENTION_OUT,
    AWQMapping("re:.*pre_feedforward_layernorm$", _GATE_UP),
    _UP_DOWN,
]
_PHI3 = [
    AWQMapping("re:.*input_layernorm$", ["re:.*qkv_proj$"]),
    AWQMapping("re:.*qkv_proj$", ["re:.*o_proj$"]),
    AWQMapping("re:.*post_attention_layernorm$", ["re:.*gate_up_proj$"]),
    AWQMapping("re:.*gate_up_proj$", ["re:.*down_proj$"]),
]
_GPT2 = [
    AWQMapping("re:.*ln_1$", ["re:.*attn.c_attn$"]),
    AWQMapping("re:.*attn.c_attn$", ["re:.*attn.c_proj$"]),
    AWQMapping("re:.*ln_2$", ["re:.*mlp.c_fc$"]),
]
# The bias-free value path of a fused, per-head interleaved projection goes to the dense layer.
_INTERLEAVED = [
    AWQMapping("re:.*input_layernorm$", ["re:.*query_key_value$"]),
    AWQMapping("re:.*query_key_value$", ["re:.*(attention|self_attention).dense$"]),
    AWQMapping("re:.*post_attention_layernorm$", ["re:.*dense_h_to_4h$"]),
]
# Post-norm: the norms feed the residual too, so only the value path can absorb a scale.
_BERT = [AWQMapping("re:.*attention.self.value$", ["re:.*attention.output.dense$"])]


def _opt(config: Any) -> list[AWQMapping]:
    """Without do_layer_norm_before (OPT-350m) the norms feed the residual and absorb nothing."""
    attention, mlp = AWQMapping("re:.*self_attn.v_proj$", ["re:.*out_proj$"]), AWQMapping("re:.*fc1$", ["re:.*fc2$"])
    if not getattr(config, "do_layer_norm_before", True):
        return [attention, mlp]
    return [
        AWQMapping("re:.*self_attn_layer_norm$", _QKV),
        attention,
        AWQMapping("re:.*final_layer_norm$", ["re:.*fc1$"]),
        mlp,
    ]


def _falcon(config: Any) -> list[AWQMapping]:
    """Falcon has one norm for both branches, one for each, or one after the other."""
    value = AWQMapping("re:.*query_key_value$", ["re:.*self_attention.dense$"])
    qkv, up = "re:.*query_key_value$", "re:.*dense_h_to_4h$"
    if getattr(config, "new_decoder_architecture", False) and getattr(config, "num_ln_in_parallel_attn", None) != 1:
        return [AWQMapping("re:.*ln_attn$", [qkv]), value, AWQMapping("re:.*ln_mlp$", [up])]
    if getattr(config, "parallel_attn", True):
        return [AWQMapping("re:.*input_layernorm$", [qkv, up]), value]
    return [AWQMapping("re:.*input_layernorm$", [qkv]), value, AWQMapping("re:.*post_attention_layernorm$", [up])]


for _name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
    register_mappings(f"{_name}ForCausalLM", _LLAMA)
for _name in ("Gemma2", "Gemma3"):
    register_mappings(f"{_name}ForCausalLM", _GEMMA)
register_mappings("Phi3ForCausalLM", _PHI3)
register_mappings("OPTForCausalLM", _opt)
register_mappings("GPT2LMHeadModel", _GPT2)
register_mappings("GPTNeoXForCausalLM", _INTERLEAVED)
register_mappings("BloomForCausalLM", _INTERLEAVED)
register_mappings("FalconForCausalLM", _falcon)
register_mappings("BertForMaskedLM", _BERT)
