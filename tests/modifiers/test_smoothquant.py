"""SmoothQuantModifier: the function stays, the maxima are balanced, and what does not fit is refused."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from bitpress import (
    AWQMapping,
    AWQModifier,
    BitpressError,
    GPTQModifier,
    Modifier,
    QuantizationModifier,
    Recipe,
    SmoothQuantModifier,
    oneshot,
)
from bitpress.models.linears import weight_matrix
from bitpress.quantization import QuantizationArgs, QuantizationScheme

# Their norms' outputs go to the residual stream, too, and can absorb nothing.
POST_NORM = ("bert", "opt_post_norm")
UP_DOWN = AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])
PER_TOKEN = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)


def scheme(bits=8, **fields):
    return QuantizationScheme(
        targets=["Linear", "Conv1D"], weights=QuantizationArgs(num_bits=bits, group_size=-1), **fields
    )


def rtn(bits=8, cls=QuantizationModifier):
    ignore = ["lm_head", "re:cls.*", "re:.*project_.*", "embed_out"]
    return cls(scheme=scheme(bits), ignore=ignore)


def compress(model, *modifiers):
    return tiny.compress(model, list(modifiers), tiny.token_data(2))


def with_outliers(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[::17] *= 50
    return model


def smooths(session):
    return {r["smooth_layer"].rpartition(".")[2] for r in session.state.mapping_records}


@pytest.fixture
def _only_smoothing(monkeypatch):
    monkeypatch.setattr(QuantizationModifier, "on_block", lambda *_: None)


@pytest.mark.usefixtures("_only_smoothing")
@pytest.mark.parametrize("strength", [0.3, 0.8, "search"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_smoothing_leaves_the_function_as_it_was(family, strength):
    model = tiny.FAMILIES[family]()
    before, expected = tiny.snapshot(model), tiny.logits(model)
    modifier = SmoothQuantModifier(smoothing_strength=strength)
    if family in POST_NORM and strength != "search":
        with pytest.raises(BitpressError, match="is left that starts at a norm"):
            compress(model, modifier, rtn(4))
        return
    session = compress(model, modifier, rtn(4))
    assert session.state.mapping_records
    assert any(not tiny.same_bits(before[n], v) for n, v in model.state_dict().items())
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


class Witness(QuantizationModifier):
    """Sees the statistics and the weights behind the smoothing."""

    def required_statistics(self, state, name):
        from bitpress.statistics import Statistic

        return Statistic.MAX_MAGNITUDE

    def on_block(self, state, block):
        for name, layer in block.layers.items():
            SEEN[name] = (state.statistics[name].max_magnitude.clone(), weight_matrix(layer).clone())


SEEN = {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon_new"])
def test_one_half_balances_the_maxima_of_inputs_and_weights(family):
    SEEN.clear()
    model = with_outliers(tiny.FAMILIES[family]())
    before = {n: weight_matrix(m).clone() for n, m in tiny.linears(model).items()}
    session = compress(model, SmoothQuantModifier(), rtn(cls=Witness))
    assert session.state.mapping_records
    for record in session.state.mapping_records:
        assert record["strength"] == 0.5
        layers = record["balance_layers"]
        greatest = torch.cat([SEEN[n][1] for n in layers]).abs().amax(0)
        ratio = SEEN[layers[0]][0] / greatest
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
        assert not torch.allclose(SEEN[layers[0]][1], before[layers[0]], rtol=0.1)


def test_the_statistics_that_follow_are_those_of_the_smoothed_model():
    """What is smoothed, and collected anew, has the maxima that the statistics were rescaled to."""
    SEEN.clear()
    model = with_outliers(tiny.llama())
    compress(model, SmoothQuantModifier(), rtn(cls=Witness))
    followed = dict(SEEN)
    SEEN.clear()
    for layer in tiny.linears(model).values():
        for name in ("quantization_scheme", "quantization_status"):
            if hasattr(layer, name):
                delattr(layer, name)
    smoothed = with_outliers(tiny.llama())
    smoothed.load_state_dict(model.state_dict(), strict=False)
    compress(smoothed, rtn(cls=Witness))
    for name, (greatest, _) in followed.items():
        torch.testing.assert_close(greatest, SEEN[name][0], rtol=1e-3, atol=1e-5)


def test_a_stated_strength_smooths_behind_norms_and_a_search_behind_all():
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert smooths(compress(tiny.llama(), SmoothQuantModifier(), rtn())) == norms
    found = compress(tiny.llama(), SmoothQuantModifier(smoothing_strength="search"), rtn())
    assert smooths(found) == {*norms, "v_proj", "up_proj"}


def test_stated_mappings_and_ignored_ones():
    assert smooths(compress(tiny.llama(), SmoothQuantModifier(mappings=[UP_DOWN]), rtn())) == {"up_proj"}
    for ignored in (["re:.*input_layernorm"], "re:.*self_attn.*"):
        found = compress(tiny.llama(), SmoothQuantModifier(ignore=ignored), rtn())
        assert smooths(found) == {"post_attention_layernorm"}
    # In part ignored is not ignored, as with the peers.
    found = compress(tiny.llama(), SmoothQuantModifier(ignore=["re:.*q_proj"]), rtn())
    assert "input_layernorm" in smooths(found)
    with pytest.raises(BitpressError, match="no mapping of LlamaForCausalLM is left"):
        compress(tiny.llama(), SmoothQuantModifier(ignore=["re:.*layernorm"]), rtn())


def test_a_mapping_in_the_order_of_other_tools():
    theirs = SmoothQuantModifier(mappings=[[["re:.*down_proj$"], "re:.*up_proj$"], ["re:.*v_proj", "re:.*o_proj"]])
    assert [str(m) for m in theirs.mappings] == [str(UP_DOWN), str(AWQMapping("re:.*v_proj", ["re:.*o_proj"]))]
    pair = "[['re:.*down_proj$'], 're:.*up_proj$']"
    text = f"- SmoothQuantModifier:\n    smoothing_strength: 0.8\n    mappings:\n    - {pair}\n"
    recipe = Recipe.of(text)
    assert recipe == Recipe.of(SmoothQuantModifier(smoothing_strength=0.8, mappings=[UP_DOWN]))
    assert Recipe.of(recipe.to_yaml()) == recipe


def test_a_wrong_mapping_is_refused():
    model = tiny.llama()
    before = tiny.snapshot(model)
    wrong = SmoothQuantModifier(mappings=[AWQMapping("re:.*gate_proj$", ["re:.*down_proj$"])])
    with pytest.raises(BitpressError, match="is not valid in"):
        compress(model, wrong, rtn())
    tiny.assert_unchanged(model, before)


@pytest.mark.parametrize("strength", [-0.1, 1.5, "much", None])
def test_a_strength_that_is_none(strength):
    with pytest.raises(BitpressError, match="smoothing_strength"):
        SmoothQuantModifier(smoothing_strength=strength)


def test_without_data_and_without_a_quantizer():
    with pytest.raises(BitpressError, match="SmoothQuantModifier needs calibration data"):
        tiny.compress(tiny.llama(), [SmoothQuantModifier(), rtn()])
    with pytest.raises(BitpressError, match="quantizes nothing"):
        compress(tiny.llama(), SmoothQuantModifier())


def test_behind_the_quantizer_it_is_refused():
    model = tiny.llama()
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match="put the modifier that smooths first"):
        compress(model, rtn(), SmoothQuantModifier())
    tiny.assert_unchanged(model, before)


class Activations(Modifier):
    """Says that inputs will be quantized, too."""

    def on_initialize(self, state):
        state.schemes = {
            name: s.model_copy(update={"input_activations": PER_TOKEN}) for name, s in state.schemes.items()
        }


def test_the_search_weighs_quantized_inputs():
    alone = compress(with_outliers(tiny.llama()), SmoothQuantModifier(smoothing_strength="search"), rtn())
    both = compress(with_outliers(tiny.llama()), Activations(), SmoothQuantModifier(smoothing_strength="search"), rtn())
    gains = {}
    for name, session in {"alone": alone, "both": both}.items():
        records = {r["smooth_layer"]: r for r in session.state.mapping_records}
        assert all(r["error"] <= r["error_before"] for r in records.values())
        gains[name] = [r["error_before"] / r["error"] for n, r in records.items() if n.endswith("layernorm")]
    # Channels that are fifty times as large cost little where inputs are exact, and much where they are not.
    assert min(gains["both"]) > 2 * max(1, min(gains["alone"]))


def test_smoothing_makes_rounded_inputs_cost_less():
    """The outputs of a model whose linear layers round their inputs per token, with and without smoothing."""
    exact = tiny.logits(with_outliers(tiny.llama()))
    errors = {}
    search = [Activations(), SmoothQuantModifier(smoothing_strength="search")]
    for name, modifiers in {"plain": [], "half": [SmoothQuantModifier()], "search": search}.items():
        model = with_outliers(tiny.llama())
        compress(model, *modifiers, rtn())
        for layer in tiny.linears(model).values():
            layer.register_forward_pre_hook(lambda _, inputs: (per_token(inputs[0]),))
        errors[name] = float((tiny.logits(model) - exact).norm())
    assert errors["half"] < 0.5 * errors["plain"]
    assert errors["search"] < 0.5 * errors["plain"]


def per_token(x):
    step = 2 * x.abs().amax(-1, keepdim=True) / 255
    return (x / step).round().clamp(-128, 127) * step


@pytest.mark.parametrize("strength", [0.5, "search"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_end_to_end(strength, dtype, tmp_path):
    with_outliers(tiny.llama()).save_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before", dtype=dtype)
    ids = [list(range(3 + i, 27 + i)) for i in range(4)]
    recipe = [SmoothQuantModifier(smoothing_strength=strength), AWQModifier(), rtn(4, GPTQModifier)]
    oneshot(model, ids, recipe, num_calibration_samples=4)
    model.save_pretrained(tmp_path / "after")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=dtype)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert len(model.bitpress.report["mappings"]) == 2 * (4 + (2 if strength == 0.5 else 4))
