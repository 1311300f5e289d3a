"""Proofs: what is valid holds, what is wrong plainly fails, and no proof leaves a trace."""

import math

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from known_mappings import known_in
from torch import nn
from torch.nn import functional as F

from bitpress.errors import BitpressError
from bitpress.models.linears import in_features
from bitpress.models.proofs import Claim, Prover, channel_maps, prove, prove_together, restored

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def deep_blocks(model):
    return [block for block in tiny.probed_blocks(model) if len(block.layers) > 1]


def claim_by_name(block, smooth, *balance):
    modules = dict(block.named_modules())
    ends = {n.removeprefix(f"{block.name}."): m for n, m in modules.items()}
    return Claim(ends[smooth], [ends[b] for b in balance])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_known_mappings_hold(family, dtype):
    model = tiny.FAMILIES[family]().to(dtype)
    before = tiny.snapshot(model)
    blocks = deep_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    for block in blocks:
        proven, prover = [], Prover(block)
        for known in known_in(block, family):
            claim = known.claim()
            proof = prove(block, claim)
            assert proof.holds, f"{known.mapping} in {block.name}: {proof.difference} > {proof.tolerance}"
            assert proof.power == 1
            assert proof.channel_map.shape == (in_features(claim.balance[0]),)
            # What has been measured for other claims of the block does not change the verdict.
            again = prover.prove(claim)
            assert again.difference == proof.difference
            assert torch.equal(again.channel_map, proof.channel_map)
            proven.append(Claim(claim.smooth, claim.balance, proof.channel_map))
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


class Latent(nn.Module):
    """Attention whose keys and values come from one projection: of each head first the keys, then the values."""

    def __init__(self, heads, key, value, width=24):
        super().__init__()
        self.heads, self.key, self.value = heads, key, value
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, heads * key)
        self.kv = nn.Linear(width, heads * (key + value))
        self.out = nn.Linear(heads * value, width)

    def forward(self, x):
        x = self.norm(x)
        q = self.q(x).unflatten(-1, (self.heads, self.key)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).split((self.key, self.value), -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 6), key=st.integers(1, 24), value=st.integers(1, 24), seed=st.integers(0, 1 << 30))
def test_values_are_found_whatever_the_sizes_of_the_parts(heads, key, value, seed):
    module = tiny.seeded(lambda: Latent(heads, key, value), seed)
    x = torch.randn(2, 5, 24, generator=seeded(seed))
    block = tiny.called(module, x)
    before = tiny.snapshot(module)
    with torch.no_grad():
        proof = prove(block, Claim(module.kv, [module.out]))
        assert proof.holds
        assert proof.power == 1
        slots = torch.arange(heads * (key + value)).view(heads, key + value)
        assert torch.equal(proof.channel_map, slots[:, key:].flatten())
        # The norm in front feeds the queries, too.
        assert prove(block, Claim(module.norm, [module.q, module.kv])).holds
        assert not prove(block, Claim(module.norm, [module.kv])).holds
    tiny.assert_unchanged(module, before)


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
    x = torch.randn(16, 8, generator=seeded(0)).to(dtype)
    return tiny.called(module, x)


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


class Composed(nn.Module):
    """Functions, one after the other."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = functions

    def forward(self, x):
        for function in self.functions:
            x = function(x)
        return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "power"),
    [
        (Composed(F.relu, torch.square), 2), (Composed(torch.square), 2), (Composed(F.leaky_relu, torch.square), 2),
        (Composed(F.relu), 1), (Composed(F.relu, torch.square, torch.sqrt), 1),
        (Composed(F.silu, torch.square), None), (Composed(F.gelu, torch.square), None),
        (Composed(torch.tanh, torch.square), None), (Composed(F.relu, lambda x: x**3), None),
        (Composed(F.relu, torch.square, lambda x: x + 1), None), (Composed(lambda x: x + 1, torch.square), None),
    ],
)  # fmt: skip
def test_a_square_passes_a_scale_twice(activation, power, dtype):
    block = two_layers(activation, dtype)
    first, last = block.module[0], block.module[2]
    before = tiny.snapshot(block.module)
    proof = prove(block, Claim(first, [last]))
    assert proof.holds is (power is not None)
    if power is not None:
        assert proof.power == power
        assert torch.equal(proof.channel_map, torch.arange(8))
    for other in (1, 2):
        tried = prove_together(block, [Claim(first, [last], torch.arange(8), other)])
        assert tried.holds is (other == power)
        assert other == power or tried.difference > 2 * tried.tolerance
    # A power that is given and wrong is passed over for one that holds.
    wrong = prove(block, Claim(first, [last], torch.arange(8), 3 - (power or 1)))
    assert (wrong.holds, wrong.power if wrong.holds else None) == (power is not None, power)
    tiny.assert_unchanged(block.module, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh()])
def test_small_activations_do_not_hide_a_wrong_mapping(activation, dtype):
    """Near 0 these are almost linear; the first layers of real models work there."""
    block = two_layers(activation, dtype)
    for parameter in block.module[0].parameters():
        parameter.mul_(0.2)
    block = tiny.called(block.module, block.calls[0].args[0])
    proof = prove(block, Claim(block.module[0], [block.module[2]]))
    assert proof.difference > 2 * proof.tolerance


def test_a_norm_in_front_of_a_square_is_not_tried():
    """A scale may pass twice from a linear layer only: what a norm gives is read as it is."""
    block = two_layers(Composed(torch.square))
    first, square, last = block.module
    norm = nn.LayerNorm(8)
    block = tiny.called(nn.Sequential(first, norm, square, last), block.calls[0].args[0])
    proof = prove(block, Claim(norm, [last]))
    assert not proof.holds
    assert proof.difference > 2 * proof.tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("convolution", "shape", "between", "positions", "commutes"),
    [
        (lambda: nn.Conv1d(3, 16, 3, stride=2), (3, 12), nn.ReLU(), 5, True),
        (lambda: nn.Conv1d(3, 16, 3, bias=False, padding=1), (3, 6), nn.Identity(), 6, True),
        (lambda: nn.Conv2d(4, 16, 3, groups=2), (4, 5, 6), nn.ReLU(), 12, True),
        (lambda: nn.Conv2d(2, 32, 2), (2, 5, 5), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 4, True),
        (lambda: nn.Conv2d(2, 32, 3), (2, 3, 3), nn.ReLU(), 1, True),
        (lambda: nn.Conv3d(2, 16, 2), (2, 3, 4, 4), nn.ReLU(), 18, True),
        (lambda: nn.Conv1d(3, 16, 3), (3, 12), nn.GELU(), 10, False),
        (lambda: nn.Conv2d(4, 16, 3), (4, 5, 6), nn.Sigmoid(), 12, False),
    ],
)  # fmt: skip
def test_convolutions_absorb_scales(convolution, shape, between, positions, commutes, dtype):
    channels = convolution().out_channels
    module = tiny.seeded(
        lambda: nn.Sequential(convolution(), between, nn.Flatten(), nn.Linear(channels * positions, 5))
    ).to(dtype)
    x = torch.randn(4, *shape, generator=seeded(0)).to(dtype)
    block = tiny.called(module, x)
    before = tiny.snapshot(block.module)
    proof = prove(block, Claim(module[0], [module[-1]]))
    assert proof.holds is commutes
    if commutes:
        # Flattening keeps the positions of a channel together.
        assert torch.equal(proof.channel_map, torch.arange(channels).repeat_interleave(positions))
    else:
        assert proof.difference > 2 * proof.tolerance
    tiny.assert_unchanged(block.module, before)


@settings(max_examples=60, deadline=None)
@given(channels=st.integers(1, 4), positions=st.integers(1, 6), seed=st.integers(0, 1 << 30))
@example(channels=2, positions=2, seed=4)  # which draws the same scale for both
def test_few_channels_are_not_taken_for_one_another(channels, positions, seed):
    """Of few random scales, those of two channels may be the same: a map that mixes them up must fail all the same."""

    def build():
        first, last = nn.Conv1d(2, channels, 3, padding=1), nn.Linear(channels * positions, 4)
        return nn.Sequential(first, nn.LeakyReLU(), nn.Flatten(), last)

    block = tiny.called(tiny.seeded(build), torch.randn(5, 2, positions, generator=seeded(0)))
    with torch.no_grad():
        proof = prove(block, Claim(block.module[0], [block.module[-1]]), seed)
    assert proof.holds
    assert torch.equal(proof.channel_map, torch.arange(channels).repeat_interleave(positions))


def test_infinities_that_are_handed_on_do_not_count():
    """As where a block gives the mask on to the next."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            mask = torch.full((4, 4), -math.inf).triu(1)
            return self.down(self.up(x).relu()), mask

    block = tiny.called(tiny.seeded(Masked), torch.randn(4, 8, generator=seeded(0)))
    assert prove(block, Claim(block.module.up, [block.module.down])).holds
    assert not prove(block, Claim(block.module.down, [block.module.up])).holds


class Noisy(nn.Module):
    """A pair of layers, and beside it whatever is drawn at random."""

    def __init__(self, beside, amount=1.0):
        super().__init__()
        self.up, self.down, self.beside, self.amount = nn.Linear(8, 16), nn.Linear(16, 8), beside, amount

    def forward(self, x):
        return self.down(F.silu(self.up(x))) + self.amount * self.beside(x)


def noisy(beside, amount=1.0, *, name="model.layers.3", training=False):
    module = tiny.seeded(lambda: Noisy(beside, amount))
    return tiny.called(module.train(training), torch.randn(4, 8, generator=seeded(0)), name)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("beside", "why"),
    [
        (nn.Dropout(0.5), "model.layers.3.beside (Dropout)"),
        (nn.Sequential(nn.Dropout(0.0), nn.AlphaDropout(0.5)), "model.layers.3.beside.1 (AlphaDropout)"),
        (Composed(torch.rand_like), "model.layers.3.beside (Composed)"),
        (nn.Sequential(Composed(lambda x: x * torch.rand(())), nn.Linear(8, 8)), "model.layers.3.beside.0 (Composed)"),
    ],
)
def test_a_block_that_changes_from_run_to_run_is_named(beside, why, together):
    block = noisy(beside, training=True)
    before = tiny.snapshot(block.module)
    claim = Claim(block.module.up, [block.module.down], torch.arange(16))
    with pytest.raises(BitpressError, match=r"the output of model\.layers\.3 changes from run to run") as error:
        prove_together(block, [claim]) if together else prove(block, claim)
    assert f": {why} draws random numbers" in str(error.value)
    assert "QuantizationModifier" in str(error.value)
    tiny.assert_unchanged(block.module, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.module.modules())


class Jittered(nn.Module):
    """Draws by itself, not in one of its modules."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(F.silu(self.up(x) + torch.randn(16)))


def test_a_block_that_draws_by_itself_is_named():
    block = tiny.called(tiny.seeded(Jittered), torch.randn(4, 8, generator=seeded(0)), "model.layers.3")
    with pytest.raises(BitpressError, match=r"in it: model\.layers\.3 \(Jittered\) draws random numbers"):
        prove(block, Claim(block.module.up, [block.module.down]))


def test_a_mapping_is_to_blame_where_the_block_is_steady():
    # Dropout does nothing in evaluation mode, and noise that rounding hides is no reason either.
    for block in (noisy(nn.Dropout(0.5)), noisy(Composed(torch.rand_like), 1e-7)):
        proof = prove(block, Claim(block.module.up, [block.module.down]))
        assert not proof.holds
        assert not proof.untested


def test_a_block_without_a_name_that_changes_from_run_to_run():
    block = noisy(Composed(torch.rand_like), name="")
    with pytest.raises(BitpressError, match="the output of the model changes from run to run"):
        prove(block, Claim(block.module.up, [block.module.down]))


def test_layers_that_no_channel_map_joins():
    block = two_layers(nn.ReLU())
    first, last = block.module[0], block.module[2]
    for claim in (Claim(nn.Linear(8, 5), [last]), Claim(nn.ReLU(), [last]), Claim(first, [last, nn.Linear(6, 4)])):
        proof = prove(block, claim)
        assert not proof.holds
        assert math.isinf(proof.difference)
        assert proof.channel_map is None


@pytest.mark.parametrize("runs", [0, 1])
def test_a_block_that_fails_under_proof_is_as_it_was(runs):
    block = two_layers(nn.ReLU())
    before = tiny.snapshot(block.module)
    calls = iter([*[None] * runs, RuntimeError("out of memory")])

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

    plain, norm = two_layers(nn.ReLU()), Exponential()
    block = tiny.called(nn.Sequential(norm, *plain.module), plain.calls[0].args[0])
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
    claims = [known.claim() for known in known_in(block, "llama")]
    right = [Claim(c.smooth, c.balance, prove(block, c).channel_map) for c in claims]
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

    block = tiny.called(Asleep(), torch.randn(4, 8, generator=seeded(0)))
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
    block = tiny.called(block.module, block.calls[0].args[0] * 20000)
    proof = prove(block, Claim(block.module[0], [block.module[2]]))
    assert not proof.holds
    assert not proof.untested
    assert math.isinf(proof.difference)
