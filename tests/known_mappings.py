"""The mappings of the tiny families, as their code is read by people: what discovery has to find, no more and no less.

They are in the order in which the balance layers run.
"""

from bitpress.models.blocks import Block
from bitpress.modifiers import AWQMapping
from bitpress.modifiers.mappings import ResolvedMapping, resolve_mapping

_QKV = ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]
_GATE_UP = ["re:.*gate_proj$", "re:.*up_proj$"]
_VALUES = AWQMapping("re:.*v_proj$", ["re:.*(o_proj|out_proj)$"])
_UP_DOWN = AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])

_LLAMA = [
    AWQMapping("re:.*input_layernorm$", _QKV),
    _VALUES,
    AWQMapping("re:.*post_attention_layernorm$", _GATE_UP),
    _UP_DOWN,
]
_GEMMA = [
    AWQMapping("re:.*input_layernorm$", _QKV),
    _VALUES,
    AWQMapping("re:.*pre_feedforward_layernorm$", _GATE_UP),
    _UP_DOWN,
]
_PHI3 = [
    AWQMapping("re:.*input_layernorm$", ["re:.*qkv_proj$"]),
    AWQMapping("re:.*qkv_proj$", ["re:.*o_proj$"]),
    AWQMapping("re:.*post_attention_layernorm$", ["re:.*gate_up_proj$"]),
    AWQMapping("re:.*gate_up_proj$", ["re:.*down_proj$"]),
]
_OPT = [
    AWQMapping("re:.*self_attn_layer_norm$", _QKV),
    _VALUES,
    AWQMapping("re:.*final_layer_norm$", ["re:.*fc1$"]),
    AWQMapping("re:.*fc1$", ["re:.*fc2$"]),
]
_GPT2 = [
    AWQMapping("re:.*ln_1$", ["re:.*attn.c_attn$"]),
    AWQMapping("re:.*attn.c_attn$", ["re:.*attn.c_proj$"]),
    AWQMapping("re:.*ln_2$", ["re:.*mlp.c_fc$"]),
]
# One norm after the other; the MLP's GELU lets no scale pass.
_FUSED_VALUES = AWQMapping("re:.*query_key_value$", ["re:.*(attention|self_attention).dense$"])
_SERIAL = [
    AWQMapping("re:.*input_layernorm$", ["re:.*query_key_value$"]),
    _FUSED_VALUES,
    AWQMapping("re:.*post_attention_layernorm$", ["re:.*dense_h_to_4h$"]),
]
# One norm for the attention and the MLP.
_PARALLEL = [AWQMapping("re:.*input_layernorm$", ["re:.*query_key_value$", "re:.*dense_h_to_4h$"]), _FUSED_VALUES]
# A norm for each.
_PARALLEL_NORMS = [
    AWQMapping("re:.*ln_attn$", ["re:.*query_key_value$"]),
    _FUSED_VALUES,
    AWQMapping("re:.*ln_mlp$", ["re:.*dense_h_to_4h$"]),
]

KNOWN: dict[str, list[AWQMapping]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), _GEMMA),
    "phi3": _PHI3,
    "opt": _OPT,
    # The norms feed the residual, and absorb nothing.
    "opt_post_norm": [_OPT[1], _OPT[3]],
    "gpt2": _GPT2,
    **dict.fromkeys(("gpt_neox", "gpt_neox_serial", "bloom", "falcon_rw"), _SERIAL),
    **dict.fromkeys(("falcon", "falcon_new_one_norm"), _PARALLEL),
    "falcon_new": _PARALLEL_NORMS,
    # As in opt_post_norm; and GELU again.
    "bert": [AWQMapping("re:.*attention.self.value$", ["re:.*attention.output.dense$"])],
}
# Those that hold, and that a family is better off without: discovery finds them, and nothing uses them unasked.
EXCLUDED: dict[str, list[AWQMapping]] = {"gemma3": [_GEMMA[0]]}


def used(family: str) -> list[AWQMapping]:
    """The mappings that a model gets where nobody states any."""
    return [mapping for mapping in KNOWN[family] if mapping not in EXCLUDED.get(family, [])]


def known_in(block: Block, family: str) -> list[ResolvedMapping]:
    """The known mappings with the layers of one block; every one of them has some in every layer of its model."""
    resolved = [resolve_mapping(mapping, block, "user") for mapping in KNOWN[family]]
    assert all(len(found) == 1 for found in resolved), f"not once each in {block.label}"
    return [found[0] for found in resolved]
