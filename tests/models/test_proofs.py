"""Proofs: what is valid holds, what is wrong plainly fails, and no proof leaves a trace."""

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block, Call
from bitpress.models.proofs import Claim, channel_maps, prove, prove_together, restored
from bitpress.modifiers.mappings import registered_mappings, resolve_mapping

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def deep_blocks(model):
    return [block for block in tiny.probed_blocks(model) if len(block.layers) > 1]


def claims_of(model, block):
    mappings = [(m, r) for m in registered_mappings(model) for r in resolve_mapping(m, block, "registry")]
    return [(m, Claim(r.smooth, list(r.balance.values()))) for m, r in mappings]


def claim_by_name(block, smooth, *balance):
    modules = dict(block.named_modules())
    ends = {n.removeprefix(f"{block.name}."): m for n, m in modules.items()}
    return Claim(ends[smooth], [ends[b] for b in balance])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_registered_mappings_hold(family, dtype):
    model = tiny.FAMILIES[family]().to(dtype)
    before = tiny.snapshot(model)
    blocks = deep_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    for block in blocks:
        proven, fitting = [], set()
        for mapping, claim in claims_of(model, block):
            fitting.add(str(mapping))
            proof = prove(block, claim)
            assert proof.holds, f"{mapping} in {block.name}: {proof.difference} > {proof.tolerance}"
            assert proof.channel_map is not None
            width = tiny.linears(claim.balance[0])[""]
            assert proof.channel_map.shape == (width.weight.shape[0 if "Conv1D" in str(type(width)) else 1],)
            proven.append(Claim(claim.smooth, claim.balance, proof.channel_map))
        assert fitting == {str(m) for m in registered_mappings(model)}, "a registered mapping that fits no layer"
        assert prove_together(block, proven).holds
    tiny.assert_unchanged(model, before)


# What a table of mappings might get wrong: the smooth layer, and the balance layers that it does not (alone) feed.
WRONG = [
    ("llama", "input_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ("llama", "mlp.gate_proj", ["mlp.down_proj"]),
    ("llama", "input_layernorm", ["self_attn.q_proj", "self_attn.k_proj"]),
    ("llama", "post_attention_layernorm", ["mlp.up_proj"]),
    ("llama", "self_attn.k_proj", ["self_attn.o_proj"]),
    ("llama", "self_attn.q_proj", ["self_attn.o_proj"]),
    ("gemma2", "post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ("qwen3", "self_attn.q_norm", ["self_attn.o_proj"]),
    ("bert", "output.LayerNorm", ["attention.self.query", "attention.self.key", "attention.self.value"]),
    ("bert", "attention.output.LayerNorm", ["intermediate.dense"]),
    ("bert", "intermediate.dense", ["output.dense"]),
    ("gpt2", "mlp.c_fc", ["mlp.c_proj"]),
    ("gpt2", "ln_1", ["mlp.c_fc"]),
    ("opt_post_norm", "self_attn_layer_norm", ["fc1"]),
    ("opt_post_norm", "final_layer_norm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("falcon", "input_layernorm", ["self_attention.query_key_value"]),
    ("falcon", "mlp.dense_h_to_4h", ["mlp.dense_4h_to_h"]),
    ("falcon_new_one_norm", "input_layernorm", ["self_attention.query_key_value"]),
    ("gpt_neox", "post_attention_layernorm", ["attention.query_key_value"]),
    ("phi3", "self_attn.qkv_proj", ["mlp.gate_up_proj"]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "smooth", "balance"), WRONG)
def test_wrong_mappings_fail_by_far(family, smooth, balance, dtype):
    model = tiny.FAMILIES[family]().to(dtype)
    before = tiny.snapshot(model)
    for block in deep_blocks(model):
        proof = prove(block, claim_by_name(block, smooth, *balance))
        assert not proof.holds
        assert proof.difference > 2 * proof.tolerance
    tiny.assert_unchanged(model, before)


@pytest.mark.parametrize("seed", range(8))
def test_no_seed_lets_a_wrong_mapping_through(seed):
    block = deep_blocks(tiny.llama().to(torch.bfloat16))[0]
    assert not prove(block, claim_by_name(block, "mlp.gate_proj", "mlp.down_proj"), seed).holds
    assert not prove(block, claim_by_name(block, "input_layernorm", "self_attn.q_proj"), seed).holds
    assert prove(block, claim_by_name(block, "mlp.up_proj", "mlp.down_proj"), seed).holds


@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (4, 2), (4, 4), (8, 2)])
def test_value_channels_of_grouped_queries_are_repeated_head_by_head(heads, shared):
    model = tiny.llama(num_attention_heads=heads, num_key_value_heads=shared)
    head = tiny.WIDTH // heads
    # transformers' repeat_kv: each key/value head serves heads / shared query heads that follow one another.
    expected = torch.arange(shared * head).view(shared, 1, head).expand(-1, heads // shared, -1).flatten()
    for block in deep_blocks(model):
        proof = prove(block, claim_by_name(block, "self_attn.v_proj", "self_attn.o_proj"))
        assert proof.holds
        assert torch.equal(proof.channel_map, expected)


def test_another_channel_map_of_grouped_queries_fails():
    block = deep_blocks(tiny.llama())[0]
    claim = claim_by_name(block, "self_attn.v_proj", "self_attn.o_proj")
    interleaved = torch.arange(32).repeat(2)
    proof = prove_together(block, [Claim(claim.smooth, claim.balance, interleaved)])
    assert not proof.holds
    # A map that is given and wrong is passed over for one that holds.
    proof = prove(block, Claim(claim.smooth, claim.balance, interleaved))
    assert proof.holds
    assert not torch.equal(proof.channel_map, interleaved)


def value_channels(family):
    """Which output of the fused projection is v of each input of the layer behind, from the models' own code."""
    width, heads = tiny.WIDTH, tiny.HEADS
    head = width // heads
    channel = torch.arange(width)
    at_head, within = channel // head, channel % head
    if family == "gpt2":  # [q, k, v]
        return 2 * width + channel
    if family == "phi3":  # [q, k, v] with two key/value heads
        return width + 2 * head + at_head // 2 * head + within
    if family in ("gpt_neox", "gpt_neox_serial", "bloom", "falcon_rw"):  # [head, (q, k, v), channel]
        return at_head * 3 * head + 2 * head + within
    if family == "falcon":  # [q, k, v] with one key and value
        return width + head + within
    # In each group: two queries, a key, a value.
    return at_head // 2 * 4 * head + 3 * head + within


@pytest.mark.parametrize(
    ("family", "smooth", "balance"),
    [
        ("phi3", "self_attn.qkv_proj", "self_attn.o_proj"),
        ("gpt2", "attn.c_attn", "attn.c_proj"),
        ("gpt_neox", "attention.query_key_value", "attention.dense"),
        ("gpt_neox_serial", "attention.query_key_value", "attention.dense"),
        ("bloom", "self_attention.query_key_value", "self_attention.dense"),
        ("falcon", "self_attention.query_key_value", "self_attention.dense"),
        ("falcon_new", "self_attention.query_key_value", "self_attention.dense"),
        ("falcon_new_one_norm", "self_attention.query_key_value", "self_attention.dense"),
        ("falcon_rw", "self_attention.query_key_value", "self_attention.dense"),
    ],
)
def test_values_are_found_in_fused_projections(family, smooth, balance):
    for block in deep_blocks(tiny.FAMILIES[family]()):
        proof = prove(block, claim_by_name(block, smooth, balance))
        assert proof.holds
        assert torch.equal(proof.channel_map, value_channels(family))


@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (8, 4), (8, 2), (2, 1), (12, 4), (12, 6), (16, 2)])
@pytest.mark.parametrize("family", ["phi3", "falcon"])
def test_values_are_found_whatever_the_heads(family, heads, shared):
    width = 96 if heads == 12 else 64
    options = {"num_attention_heads": heads, "hidden_size": width}
    if family == "phi3":
        model = tiny.phi3(**options, num_key_value_heads=shared)
        names = "self_attn.qkv_proj", "self_attn.o_proj"
    else:
        model = tiny.falcon(**options, new_decoder_architecture=True, num_kv_heads=shared)
        names = "self_attention.query_key_value", "self_attention.dense"
    block = deep_blocks(model)[0]
    assert prove(block, claim_by_name(block, *names)).holds


def test_up_half_of_a_fused_gate_and_up_projection():
    block = deep_blocks(tiny.phi3())[0]
    proof = prove(block, claim_by_name(block, "mlp.gate_up_proj", "mlp.down_proj"))
    assert proof.holds
    assert torch.equal(proof.channel_map, torch.arange(96, 192))


@settings(max_examples=200, deadline=None)
@given(channels=st.integers(1, 96), width=st.integers(1, 96))
def test_every_channel_map_is_one(channels, width):
    for channel_map in channel_maps(channels, width):
        assert channel_map.shape == (width,)
        assert channel_map.dtype == torch.int64
        assert int(channel_map.min()) >= 0
        assert int(channel_map.max()) < channels


def two_layers(activation, dtype=torch.float32, width=8):
    module = tiny.seeded(lambda: nn.Sequential(nn.Linear(8, width), activation, nn.Linear(width, 4))).to(dtype)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Block("", module, {}, [Call((x,), {})])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "commutes"),
    [
        (nn.ReLU(), True), (nn.Identity(), True), (nn.LeakyReLU(), True),
        (nn.GELU(), False), (nn.SiLU(), False), (nn.Tanh(), False), (nn.Sigmoid(), False), (nn.ReLU6(), False),
    ],
)  # fmt: skip
def test_activations_that_a_positive_scale_passes(activation, commutes, dtype):
    block = two_layers(activation, dtype)
    proof = prove(block, Claim(block.module[0], [block.module[2]]))
    assert proof.holds is commutes
    assert commutes or proof.difference > 2 * proof.tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh()])
def test_small_activations_do_not_hide_a_wrong_mapping(activation, dtype):
    """Near 0 these are almost linear; the first layers of real models work there."""
    block = two_layers(activation, dtype)
    for parameter in block.module[0].parameters():
        parameter.mul_(0.2)
    proof = prove(block, Claim(block.module[0], [block.module[2]]))
    assert proof.difference > 2 * proof.tolerance


def test_layers_that_no_channel_map_joins():
    block = two_layers(nn.ReLU())
    first, last = block.module[0], block.module[2]
    for claim in (Claim(nn.Linear(8, 5), [last]), Claim(nn.ReLU(), [last]), Claim(first, [last, nn.Linear(6, 4)])):
        proof = prove(block, claim)
        assert not proof.holds
        assert math.isinf(proof.difference)
        assert proof.channel_map is None


def test_a_block_that_fails_under_proof_is_as_it_was():
    block = two_layers(nn.ReLU())
    before = tiny.snapshot(block.module)
    calls = iter([None, RuntimeError("out of memory")])

    def fail(*_):
        if isinstance(error := next(calls, None), Exception):
            raise error

    with block.module.register_forward_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        prove(block, Claim(block.module[0], [block.module[2]]))
    tiny.assert_unchanged(block.module, before)


def test_a_norm_that_absorbs_nothing_leaves_the_block_as_it_was():
    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x):
            return x * self.weight.exp()

    block = two_layers(nn.ReLU())
    norm = Exponential()
    block.module.insert(0, norm)
    before = tiny.snapshot(block.module)
    with pytest.raises(BitpressError, match="Exponential cannot absorb a scale"):
        prove(block, Claim(norm, [block.module[1]]))
    tiny.assert_unchanged(block.module, before)


def test_restored_undoes_everything():
    block = two_layers(nn.ReLU())
    before = tiny.snapshot(block.module)

    def spoil():
        with restored([block.module, block.module[0]]):
            for parameter in block.module.parameters():
                parameter.zero_()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        spoil()
    tiny.assert_unchanged(block.module, before)


def test_all_at_once_finds_the_wrong_one_among_the_right():
    model = tiny.llama().to(torch.bfloat16)
    block = deep_blocks(model)[0]
    right = [Claim(c.smooth, c.balance, prove(block, c).channel_map) for _, c in claims_of(model, block)]
    gate = claim_by_name(block, "mlp.gate_proj", "mlp.down_proj")
    assert prove_together(block, right).holds
    assert not prove_together(block, [*right, Claim(gate.smooth, gate.balance, torch.arange(96))]).holds


def test_layers_that_do_not_run_are_untested():
    class Asleep(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return self.norm(x)

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    block = Block("", Asleep(), {}, [Call((x,), {})])
    other = nn.Linear(8, 8)
    proof = prove(block, Claim(other, [block.module.up]))
    assert proof.untested
    assert not proof.holds
    # The norm does run, and something else reads it.
    proof = prove(block, Claim(block.module.norm, [block.module.up]))
    assert not proof.untested
    assert not proof.holds


def test_an_overflow_is_a_failure():
    block = two_layers(nn.ReLU(), torch.float16)
    call = block.calls[0]
    block.calls[0] = Call((call.args[0] * 20000,), {})
    proof = prove(block, Claim(block.module[0], [block.module[2]]))
    assert not proof.holds
    assert not proof.untested
    assert math.isinf(proof.difference)
