"""Discovery: the mappings of any block, found by running it, and why the other layers have none."""

import pytest
import tiny
import torch
from known_mappings import known_in
from torch import nn
from torch.nn import functional as F
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
OTHERS = {
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
            ("kv_b_proj", ("o_proj",)),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_finds_the_known_mappings_and_no_others(family, dtype):
    model = tiny.FAMILIES[family]().to(dtype)
    before = tiny.snapshot(model)
    blocks = deep_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    for block in blocks:
        findings = discover(block)
        # In the order in which the balance layers run.
        found = [(d.smooth, set(d.balance)) for d in findings.found]
        assert found == [(m.smooth_name, set(m.balance)) for m in known_in(block, family)]
        assert all(d.proof.holds and d.proof.power == 1 for d in findings.found)
        # Every layer is accounted for, once.
        balanced = [name for d in findings.found for name in d.balance]
        left = [name for each in findings.left for name in each.layers]
        assert sorted(balanced + left) == sorted(block.layers)
        assert all(each.why for each in findings.left)
    tiny.assert_unchanged(model, before)


@pytest.mark.parametrize("name", OTHERS)
def test_finds_the_mappings_of_other_families(name):
    build, expected = OTHERS[name]
    model = tiny.seeded(build)
    before = tiny.snapshot(model)
    for block in deep_blocks(model):
        found = discover(block).found
        assert {(last(d.smooth), tuple(last(b) for b in d.balance)) for d in found} == expected
        assert all(d.proof.difference <= d.proof.tolerance for d in found)
    tiny.assert_unchanged(model, before)


@pytest.mark.parametrize("name", OTHERS)
def test_awq_uses_what_it_finds(name):
    build, expected = OTHERS[name]
    model = tiny.seeded(build)
    recipe = [AWQModifier(bits=4, symmetric=False, group_size=32, ignore=["lm_head"])]
    session = tiny.compress(model, recipe, tiny.token_data())
    records = session.state.mapping_records
    assert {r["source"] for r in records} == {"discovery"}
    assert len(records) == 2 * len(expected)
    assert all(r["error"] <= r["error_before"] for r in records)


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


WIDE = 32


class Exponential(nn.Module):
    """Not linear in its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDE))

    def forward(self, x):
        return x * self.weight.exp()


class Small(nn.Module):
    """A block of whatever parts, which run as a function of it and x says."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


def linear(width=WIDE, out=WIDE):
    return nn.Linear(width, out)


def findings_of(build, name="layers.5"):
    module = tiny.seeded(build)
    layers = {f"{name}.{n}": m for n, m in tiny.linears(module).items()}
    x = torch.randn(6, WIDE, generator=torch.Generator().manual_seed(0))
    found = discover(tiny.called(module, x, name, layers))
    plain = {d.smooth.removeprefix(f"{name}."): [b.removeprefix(f"{name}.") for b in d.balance] for d in found.found}
    return plain, {tuple(n.removeprefix(f"{name}.") for n in left.layers): left.why for left in found.left}


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: Small(lambda m, x: m.down(x), down=linear()), "no norm, linear layer or convolution runs before it"),
        (
            lambda: Small(lambda m, x: m.down(F.gelu(m.up(x))), up=linear(), down=linear()),
            "nothing before it absorbs its scale: with the best, layers.5.up, the block's output moves by 0.",
        ),
        (
            lambda: Small(lambda m, x: m.norm(x).mean(-1, keepdim=True) + m.down(x), norm=nn.LayerNorm(WIDE),
                          down=linear()),
            "nothing before it absorbs its scale: with the best, layers.5.norm",
        ),
        (
            lambda: Small(lambda m, x: m.down(m.up(x).view(6, 2, -1).sum(1)[:, :12]), up=linear(WIDE, 100),
                          down=linear(12)),
            "nothing before it absorbs its scale",
        ),
        (
            lambda: Small(lambda m, x: m.down(torch.cat([m.up(x), x], -1)), up=linear(out=5), down=linear(WIDE + 5)),
            "no layer before it has output channels that fit its inputs (the nearest is layers.5.up)",
        ),
        (
            lambda: Small(lambda m, x: m.down(m.down(m.norm(x))), norm=nn.LayerNorm(WIDE), down=linear()),
            "it runs 2 times in its block",
        ),
        (
            lambda: Small(lambda m, x: m.norm(x), norm=nn.LayerNorm(WIDE), down=linear()),
            "it did not run in the dry run",
        ),
        (
            lambda: Small(lambda m, x: x + 0 * m.down(m.norm(x)), norm=nn.LayerNorm(WIDE), down=linear()),
            "it has no share in the block's output in the dry run",
        ),
        (
            lambda: Small(lambda m, x: m.down(m.norm(x)), norm=Exponential(), down=linear()),
            "Exponential cannot absorb a scale",
        ),
    ],
)  # fmt: skip
def test_says_why_a_layer_has_no_mapping(build, why):
    _, left = findings_of(build)
    assert why in left[("down",)]


def test_a_block_that_is_a_layer():
    layer = linear()
    findings = discover(tiny.called(layer, torch.randn(2, WIDE), "lm_head", {"lm_head": layer}))
    assert findings.found == []
    assert [(left.layers, left.why) for left in findings.left] == [
        (("lm_head",), "it is a block of its own: nothing runs before it there")
    ]


def test_views_of_one_tensor_are_one_input():
    """As where the experts of a mixture get the tokens in rows: they are those that the router gets by sequences."""

    def run(module, x):
        h = module.norm(x).view(2, 3, WIDE)
        return (
            x + module.a(h).view(6, WIDE) + module.b(h.view(-1, WIDE)) + module.c(h.reshape(3, 2, WIDE)).flatten(0, 1)
        )

    found, left = findings_of(lambda: Small(run, norm=nn.LayerNorm(WIDE), a=linear(), b=linear(), c=linear()))
    assert found == {"norm": ["a", "b", "c"]}
    assert left == {}


def test_rows_in_another_order_are_joined_where_they_balance_together():
    """Neither holds by itself: the other reads the norm, too."""

    def run(module, x):
        h = module.norm(x)
        return x + module.a(h) + module.b(h.flip(0))

    found, left = findings_of(lambda: Small(run, norm=nn.LayerNorm(WIDE), a=linear(), b=linear()))
    assert found == {"norm": ["a", "b"]}
    assert left == {}


def test_a_layer_absorbs_one_scale():
    """Both ReLUs read the same layer; what it can do for one of them alone moves the other."""

    def run(module, x):
        h = module.up(x)
        return module.a(h.relu()) + module.b((2 * h).relu())

    found, left = findings_of(lambda: Small(run, up=linear(), a=linear(), b=linear()))
    assert found == {"up": ["a", "b"]}
    assert left == {("up",): "no norm, linear layer or convolution runs before it in its block"}


def test_the_nearest_layer_absorbs():
    """Norm, linear layer, ReLU: each is absorbed by the latest that can."""
    parts = {"norm": nn.LayerNorm(WIDE), "a": linear(), "b": linear(), "c": linear()}
    found, left = findings_of(lambda: Small(lambda m, x: m.c(m.b(m.a(m.norm(x)).relu()).relu()), **parts))
    assert found == {"norm": ["a"], "a": ["b"], "b": ["c"]}
    assert left == {}


@pytest.mark.parametrize(
    ("build", "expected", "power"),
    [
        (lambda: Small(lambda m, x: m.down(m.up(x).relu().square()), up=linear(), down=linear()), "up", 2),
        (
            lambda: Small(lambda m, x: m.down(m.up(x.unsqueeze(1)).relu().flatten(1)), up=nn.Conv1d(1, 8, 3, padding=1),
                          down=linear(8 * WIDE)),
            "up",
            1,
        ),
    ],
)  # fmt: skip
def test_squares_and_convolutions_are_found(build, expected, power):
    module = tiny.seeded(build)
    x = torch.randn(6, WIDE, generator=torch.Generator().manual_seed(0))
    findings = discover(tiny.called(module, x, layers=tiny.linears(module)))
    assert [(d.smooth, d.balance, d.proof.power) for d in findings.found] == [(expected, ("down",), power)]


def test_a_block_that_changes_from_run_to_run_is_named():
    with pytest.raises(
        BitpressError, match=r"layers\.5 changes from run to run.*layers\.5\.drop \(Dropout\) draws random"
    ):
        findings_of(
            lambda: Small(
                lambda m, x: m.down(m.drop.train()(F.silu(m.up(x)))), up=linear(), drop=nn.Dropout(), down=linear()
            )
        )


def test_structure_tells_kinds_of_blocks_apart():
    one, same, other = (b for b in deep_blocks(tiny.llama(num_hidden_layers=3)))
    assert structure(one) == structure(same)
    other.module.mlp.down_proj = nn.Linear(96, 64, bias=True)
    assert structure(one) != structure(other)
