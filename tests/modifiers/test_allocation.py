"""Bit allocation, from the fields to the checkpoint."""

import architectures
import pytest
import tiny
import torch
from compressing import awq, rtn, scheme, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import bitpress
from bitpress import AWQModifier, BitpressError, GPTQModifier, QuantizationModifier, Recipe, oneshot
from bitpress.models.linears import weight_matrix
from bitpress.modifiers.allocation import describe
from bitpress.session import Session

GRIDS = {bits: scheme(bits) for bits in (2, 3, 4, 8)}


def fields(*bits, budget=3.5, **options):
    return {
        "ignore": ["lm_head"],
        "choose_from": [GRIDS[b] for b in bits or (3, 4)],
        **({} if "max_bytes" in options else {"bits_per_weight": budget}),
        **options,
    }


def compress(model, *modifiers, **options):
    return oneshot(model, token_ids(), list(modifiers), num_calibration_samples=6, **options)


def bits_of(model):
    return {
        name: module.quantization_scheme.weights.num_bits
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }


def mean_bits(model):
    found = bits_of(model)
    sizes = {name: weight_matrix(model.get_submodule(name)).numel() for name in found}
    return sum(sizes[name] * bits for name, bits in found.items()) / sum(sizes.values())


@settings(max_examples=6, deadline=None)
@given(st.floats(2, 9))
def test_bits_per_weight_is_kept_to_and_used(budget):
    model = compress(tiny.llama(), QuantizationModifier(**fields(2, 3, 4, 8, budget=budget)))
    allocation = model.bitpress.report["allocations"][0]
    assert mean_bits(model) == pytest.approx(allocation["bits_per_weight"])
    assert mean_bits(model) <= budget
    # No layer is more than a fifth of this model.
    assert mean_bits(model) > min(budget, 8) - 1


@settings(max_examples=6, deadline=None)
@given(st.floats(0, 1.2))
def test_max_bytes_is_kept_to_as_stored(share):
    sizes = [compress(tiny.llama(), *rtn(bits=b)).bitpress.report["weight_bytes_after"] for b in (2, 8)]
    budget = int(sizes[0] + share * (sizes[1] - sizes[0]))
    report = compress(tiny.llama(), QuantizationModifier(**fields(2, 3, 4, 8, max_bytes=budget))).bitpress.report
    assert report["weight_bytes_after"] == report["allocations"][0]["stored_bytes"] <= budget
    assert report["weight_bytes_after"] >= min(budget, sizes[1]) - 0.2 * sizes[1]


def test_the_growth_within_the_budget_is_less_than_that_of_swapped_choices():
    model = compress(tiny.llama(), QuantizationModifier(**fields()))
    groups = model.bitpress.report["allocations"][0]["groups"]
    low, high = (describe(GRIDS[b].weights) for b in (3, 4))
    size = {id(g): sum(model.get_submodule(n).weight.numel() for n in g["layers"]) for g in groups}
    gain = {id(g): g["growth"][low] - g["growth"][high] for g in groups}
    assert {g["chosen"] for g in groups} == {low, high}
    for raised in (g for g in groups if g["chosen"] == high):
        for other in (g for g in groups if g["chosen"] == low):
            if size[id(other)] <= size[id(raised)]:
                assert gain[id(other)] <= gain[id(raised)]


def test_what_engines_fuse_has_one_scheme():
    found = bits_of(compress(tiny.llama(), QuantizationModifier(**fields(2, 3, 4, 8, budget=4))))
    assert len(set(found.values())) > 1
    for layer in range(2):
        at = f"model.layers.{layer}"
        assert len({found[f"{at}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert found[f"{at}.mlp.gate_proj"] == found[f"{at}.mlp.up_proj"]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_experts_of_one_module_have_one_scheme(family):
    model = architectures.ARCHITECTURES[family].build()
    session = Session(model, QuantizationModifier(**fields(3, 4, 8, budget=4)))
    session.check()
    session.initialize(tiny.token_data())
    session.run()
    groups = session.state.allocations[0]["groups"]
    experts = [g["layers"] for g in groups if any(".experts." in name for name in g["layers"])]
    assert experts
    owners = [{name.partition(".experts.")[0] for name in layers} for layers in experts]
    assert all(len(owner) == 1 for owner in owners)
    assert len({next(iter(owner)) for owner in owners}) == len(experts)
    assert all(".experts." in name for layers in experts for name in layers)


class Listed(nn.Module):
    """Experts in a list beside a router, each of which sees some of the rows."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 3)
        self.experts = nn.ModuleList(tiny.MLP(64, 32, 64) for _ in range(3))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        weight, chosen = scores.max(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = chosen == index
            y[rows] = expert(x[rows]) * weight[rows].unsqueeze(1)
        return x + y


def test_experts_in_a_list_have_one_scheme():
    torch.manual_seed(0)
    model = nn.Sequential(*(Listed() for _ in range(3)))
    stated = fields(3, 4, 8, budget=4, ignore=["re:.*router"])
    oneshot(model, torch.randn(64, 64), QuantizationModifier(**stated), batch_size=16, num_calibration_samples=64)
    found = bits_of(model)
    assert len(found) == 18
    for block in range(3):
        assert len({bits for name, bits in found.items() if name.startswith(f"{block}.")}) == 1


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ([QuantizationModifier(**fields())], "rtn"),
        ([AWQModifier(symmetric=False), GPTQModifier(**fields())], "awq+gptq"),
        ([AWQModifier(**fields(3, 4, 8))], "awq alone"),
    ],
)
def test_a_mixed_checkpoint_has_the_logits_of_the_model_in_memory(recipe, kind, tmp_path):
    model = compress(tiny.llama(), *recipe)
    assert len(set(bits_of(model).values())) > 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert len(loaded.config.quantization_config.quantization_config.config_groups) > 1
    # What is stored is what the report says.
    stored = load_file(tmp_path / "model.safetensors")
    weights = sum(t.nbytes for name, t in stored.items() if ".weight_" in name)
    assert weights == model.bitpress.report["allocations"][0]["stored_bytes"]


def test_plain_modules():
    torch.manual_seed(0)
    model = oneshot(
        tiny.MLP(64, 64, 64, 64),
        torch.randn(64, 64),
        AWQModifier(**fields(ignore=[])),
        num_calibration_samples=64,
    )
    assert model.bitpress.report["allocations"][0]["loss"] == "output"
    assert sorted(bits_of(model).values()) == [3, 3, 4]


def test_presets_and_schemes_in_yaml(tmp_path):
    text = """
- GPTQModifier:
    ignore: [lm_head]
    bits_per_weight: 5
    choose_from:
      - weights: {num_bits: 4, symmetric: true, strategy: group, group_size: 32}
      - weights: {num_bits: 8, symmetric: true, strategy: channel}
"""
    recipe = Recipe.of(text)
    assert Recipe.of(recipe.to_yaml()) == recipe
    model = compress(tiny.llama(), *recipe.modifiers)
    assert set(bits_of(model).values()) == {4, 8}
    presets = "- QuantizationModifier: {choose_from: [W4A16, W8A16], bits_per_weight: 6, ignore: [lm_head]}\n"
    width = {"hidden_size": 128, "intermediate_size": 256}
    model = compress(tiny.llama(**width), *Recipe.of(presets).modifiers)
    assert set(bits_of(model).values()) == {4, 8}


def test_schemes_are_candidates_where_their_targets_match():
    only_mlp = scheme(2, targets=["re:.*mlp.*"])
    model = compress(tiny.llama(), QuantizationModifier(**fields(budget=3.3, choose_from=[only_mlp, GRIDS[4]])))
    found = bits_of(model)
    assert {bits for name, bits in found.items() if "self_attn" in name} == {4}
    assert {bits for name, bits in found.items() if "mlp" in name} == {2, 4}


class Idle(tiny.MLP):
    def __init__(self):
        super().__init__(64, 64, 64)
        self.unused = nn.Linear(64, 64)


def test_a_layer_that_is_not_reached_has_the_largest_scheme(caplog):
    model = oneshot(Idle(), torch.randn(16, 64), QuantizationModifier(**fields(2, 4, budget=3, ignore=[])))
    assert bits_of(model)["unused"] == 4
    assert "unused: no gradient reached it" in caplog.text


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"choose_from": ["W4A16", "W8A16"]}, "needs one budget, bits_per_weight or max_bytes"),
        ({"choose_from": ["W4A16"], "bits_per_weight": 5, "max_bytes": 9}, "needs one budget"),
        ({"bits_per_weight": 5}, "bits_per_weight is a budget: say with choose_from="),
        ({"choose_from": ["W4A15"], "bits_per_weight": 5}, "no preset is called 'W4A15'; did you mean 'W4A16'"),
        ({"choose_from": [], "bits_per_weight": 5}, "choose_from is empty"),
        ({"choose_from": [scheme(3), scheme(3)], "bits_per_weight": 5}, "names int3, asymmetric, groups of 32 twice"),
        ({"choose_from": [scheme(3), scheme(4)], "bits_per_weight": 2.5}, r"cannot be met: .* take 3 bits per weight"),
        ({"choose_from": [scheme(3), scheme(4)], "max_bytes": 1000}, r"cannot be met: .* take \d+ bytes"),
        ({"choose_from": [scheme(3)], "bits_per_weight": 4, "scheme": "W4A16"}, "choose_from, or scheme"),
        ({"choose_from": [scheme(3), scheme(4, group_size=48)], "bits_per_weight": 4}, "group_size 48 does not divide"),
    ],
)
def test_refusals(stated, message):
    model = tiny.llama()
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match=message):
        compress(model, QuantizationModifier(ignore=["lm_head"], **stated))
    tiny.assert_unchanged(model, before)


def test_fused_layers_without_a_common_candidate_are_refused():
    grids = [scheme(3, targets=["re:.*(q_proj|mlp).*"]), scheme(4, targets=["re:.*(k_proj|v_proj|o_proj|mlp).*"])]
    with pytest.raises(BitpressError, match=r"q_proj, .* must have one scheme"):
        compress(tiny.llama(), QuantizationModifier(choose_from=grids, bits_per_weight=4))


def test_no_data_is_refused():
    with pytest.raises(BitpressError, match="QuantizationModifier needs calibration data, but no dataset was given"):
        oneshot(tiny.llama(), None, QuantizationModifier(**fields()))


def test_awq_that_states_what_a_candidate_has_not_is_refused():
    with pytest.raises(BitpressError, match=r"AWQModifier states bits=4, but the scheme of .* has bits=3"):
        compress(tiny.llama(), AWQModifier(bits=4), QuantizationModifier(**fields(4, 3)))


def test_a_recipe_that_chooses_nothing_measures_nothing():
    report = compress(tiny.llama(), *awq()).bitpress.report
    assert "allocations" not in report
    assert "measure" not in report["seconds"]


def test_saved_and_loaded_without_transformers(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    model = oneshot(tiny.MLP(64, 64, 64, 64), x, QuantizationModifier(**fields(ignore=[])), num_calibration_samples=64)
    bitpress.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(bitpress.load(tmp_path, tiny.MLP(64, 64, 64, 64))(x), model(x))


class Overflowing(QuantizationModifier):
    def on_gradient(self, state, name, gradient):
        super().on_gradient(state, name, gradient * float("inf"))


def test_gradients_that_are_not_finite_are_refused():
    model = tiny.llama()
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match=r"q_proj and 2 more: a gradient of the loss is not finite"):
        compress(model, Overflowing(**fields()))
    tiny.assert_unchanged(model, before)


def test_two_modifiers_choose_each_for_its_own():
    attention = QuantizationModifier(**fields(3, 4, budget=3.5, targets=["re:.*self_attn.*"], ignore=[]))
    mlp = QuantizationModifier(**fields(4, 8, budget=6, targets=["re:.*mlp.*"], ignore=[]))
    model = compress(tiny.llama(), attention, mlp)
    first, second = model.bitpress.report["allocations"]
    assert first["bits_per_weight"] <= 3.5 < second["bits_per_weight"] <= 6
    found = bits_of(model)
    assert {bits for name, bits in found.items() if "self_attn" in name} == {3, 4}
    assert {bits for name, bits in found.items() if "mlp" in name} == {4, 8}
