"""Discovery: the mappings of any block, found by running it; and AWQ on models that no table lists."""

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from bitpress import AWQModifier, BitpressError, oneshot
from bitpress.models.discovery import discover, structure
from bitpress.modifiers import mappings as registry
from bitpress.modifiers.mappings import registered_mappings, resolve_mapping

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QKV = ("q_proj", "k_proj", "v_proj")
DEEPSEEK = {
    **SHAPE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
UNLISTED = {
    "stablelm": (
        lambda: StableLmForCausalLM(StableLmConfig(**SHAPE)),
        {
            ("input_layernorm", QKV),
            ("v_proj", ("o_proj",)),
            ("post_attention_layernorm", ("gate_proj", "up_proj")),
            ("up_proj", ("down_proj",)),
        },
    ),
    "cohere, attention and MLP in parallel": (
        lambda: CohereForCausalLM(CohereConfig(**SHAPE)),
        {("input_layernorm", (*QKV, "gate_proj", "up_proj")), ("v_proj", ("o_proj",)), ("up_proj", ("down_proj",))},
    ),
    "olmo2, norms after the layers": (
        lambda: Olmo2ForCausalLM(Olmo2Config(**SHAPE)),
        {("v_proj", ("o_proj",)), ("up_proj", ("down_proj",))},
    ),
    "deepseek, latent attention": (
        lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)),
        {
            ("input_layernorm", ("q_a_proj", "kv_a_proj_with_mqa")),
            ("q_a_layernorm", ("q_b_proj",)),
            ("kv_a_layernorm", ("kv_b_proj",)),
            ("post_attention_layernorm", ("gate_proj", "up_proj")),
            ("up_proj", ("down_proj",)),
        },
    ),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def last(name):
    return name.rpartition(".")[2]


def deep_blocks(model):
    return [block for block in tiny.probed_blocks(model) if len(block.layers) > 1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_finds_all_that_is_registered(family):
    model = tiny.FAMILIES[family]()
    for block in deep_blocks(model):
        found = {(d.smooth, frozenset(d.balance)) for d in discover(block)}
        for mapping in registered_mappings(model):
            for stated in resolve_mapping(mapping, block, "registry"):
                assert (stated.smooth_name, frozenset(stated.balance)) in found


@pytest.mark.parametrize("name", UNLISTED)
def test_finds_the_mappings_of_models_that_no_table_lists(name):
    build, expected = UNLISTED[name]
    model = tiny.seeded(build)
    assert registered_mappings(model) is None
    before = tiny.snapshot(model)
    for block in deep_blocks(model):
        found = discover(block)
        assert {(last(d.smooth), tuple(last(b) for b in d.balance)) for d in found} == expected
        assert all(d.proof.difference <= d.proof.tolerance for d in found)
    tiny.assert_unchanged(model, before)


@pytest.mark.parametrize("name", UNLISTED)
def test_awq_uses_what_it_finds(name):
    build, expected = UNLISTED[name]
    model = tiny.seeded(build)
    recipe = [AWQModifier(bits=4, symmetric=False, group_size=32, ignore=["lm_head"])]
    session = tiny.compress(model, recipe, tiny.token_data())
    records = session.state.mapping_records
    assert {r["source"] for r in records} == {"discovery"}
    assert len(records) == 2 * len(expected)
    assert all(r["error"] <= r["error_before"] for r in records)


def test_without_the_registry_the_result_is_the_same(monkeypatch):
    listed, unlisted = tiny.llama(), tiny.llama()
    recipe = [AWQModifier(bits=4, symmetric=False, group_size=32, ignore=["lm_head"])]
    tiny.compress(listed, recipe, tiny.token_data())
    monkeypatch.setattr(registry, "_REGISTRY", {})
    tiny.compress(unlisted, recipe, tiny.token_data())
    for (name, a), b in zip(listed.state_dict().items(), unlisted.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Residual(nn.Module):
    """A block of a plain model: norm, linear, ReLU, linear."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def test_plain_modules_need_no_mappings():
    model = tiny.seeded(lambda: nn.Sequential(Residual(), Residual(), nn.Linear(32, 4)))
    data = [torch.randn(8, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    oneshot(model, data, [AWQModifier(bits=4, group_size=32)])
    found = {(r["smooth_layer"], *r["balance_layers"]) for r in model.bitpress.report["mappings"]}
    assert found == {("0.norm", "0.up"), ("0.up", "0.down"), ("1.norm", "1.up"), ("1.up", "1.down")}


def test_a_layer_that_runs_twice_is_left_out():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(self.layer(self.norm(x)))

    model = tiny.seeded(lambda: nn.Sequential(Twice(), Twice()))
    with pytest.raises(BitpressError, match="no mapping fits Sequential"):
        oneshot(model, [torch.randn(4, 32)], [AWQModifier(bits=4, group_size=32)])


def test_structure_tells_kinds_of_blocks_apart():
    one, same, other = (b for b in deep_blocks(tiny.llama(num_hidden_layers=3)))
    assert structure(one) == structure(same)
    other.module.mlp.down_proj = nn.Linear(96, 64, bias=True)
    assert structure(one) != structure(other)
