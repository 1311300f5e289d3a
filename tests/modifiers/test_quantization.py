"""QuantizationModifier: which layers get which grid, and every refusal before anything is changed."""

import logging

import pytest
import tiny
import torch
from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.linears import weight_matrix
from bitpress.modifiers import QuantizationModifier
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.session import Session
from bitpress.solvers import round_to_nearest


def grid(bits=4, group_size=32, **options):
    return QuantizationArgs(**{"num_bits": bits, "symmetric": True, "group_size": group_size, **options})


def scheme(*targets, **options):
    return QuantizationScheme(targets=list(targets) or ["Linear"], weights=grid(**options))


# Fits every width.
PER_CHANNEL = scheme(bits=8, group_size=-1)


def resolved(model, **fields):
    """The targeted layers with their bits."""
    found = QuantizationModifier(**fields).resolve_schemes(model)
    return {name: each.weights.num_bits for name, each in found.items()}


def refused(model, match, *modifiers, **fields):
    """The message of the refusal; the model is as it was."""
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match=match) as error:
        tiny.compress(model, list(modifiers) or [QuantizationModifier(**fields)])
    tiny.assert_unchanged(model, before)
    assert not any(hasattr(m, "quantization_scheme") for m in model.modules())
    return str(error.value)


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


def test_every_linear_layer_by_default(model):
    assert list(resolved(model, scheme=scheme())) == list(tiny.linears(model))


def test_conv1d_by_default():
    model = tiny.gpt2(n_embd=128)
    found = resolved(model, scheme="W8A16")
    assert set(found) == set(tiny.linears(model)) - {"lm_head"}
    assert any(type(model.get_submodule(n)).__name__ == "Conv1D" for n in found)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["lm_head"], ["lm_head"]),
        ("lm_head", ["lm_head"]),
        (["re:.*down_proj$"], ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        (["model.layers.1.mlp.up_proj", "lm_head"], ["model.layers.1.mlp.up_proj", "lm_head"]),
    ],
)
def test_targets_by_name_and_pattern(model, targets, expected):
    assert list(resolved(model, targets=targets, scheme=PER_CHANNEL)) == expected
    groups = {"any name": scheme(*([targets] if isinstance(targets, str) else targets))}
    assert list(resolved(model, config_groups=groups)) == expected


@pytest.mark.parametrize(
    ("ignore", "gone"),
    [(["lm_head"], 1), ("lm_head", 1), (["re:.*(q|k|v)_proj$"], 6), (["re:model.layers.0.*"], 7), (["Linear"], 15)],
)
def test_ignore(model, ignore, gone):
    total = len(tiny.linears(model))
    if gone == total:
        refused(model, "every layer that targets match is ignored", ignore=ignore, scheme=PER_CHANNEL)
    else:
        assert len(resolved(model, ignore=ignore, scheme=PER_CHANNEL)) == total - gone


def test_ignore_that_matches_nothing_warns(model, caplog):
    with caplog.at_level(logging.WARNING):
        resolved(model, ignore=["lm_heat"], scheme=PER_CHANNEL)
    assert "'lm_heat' matches nothing" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        resolved(model, ignore=["lm_head", "re:.*self_attn$", "LlamaMLP"], scheme=PER_CHANNEL)
    assert not caplog.text


@pytest.mark.parametrize(
    ("target", "suggestion"),
    [
        ("lm_heat", "lm_head"),
        ("Linera", "Linear"),
        ("model.layers.0.mlp.upproj", "model.layers.0.mlp.up_proj"),
        ("re:.*nothing$", None),
        ("LlamaMLP", None),
    ],
)
def test_target_that_matches_nothing(model, target, suggestion):
    for fields in ({"targets": [target], "scheme": "W8A16"}, {"config_groups": {"g": scheme("Linear", target)}}):
        message = refused(model, "matches no linear layer", **fields)
        assert repr(target) in message
        assert "Linear" in message
        assert suggestion is None or f"did you mean {suggestion!r}?" in message


def test_model_without_linear_layers():
    refused(nn.Sequential(nn.Embedding(4, 4)), "matches no linear layer", scheme=PER_CHANNEL)


def test_group_size_that_does_not_divide_names_layers_and_sizes(model):
    message = refused(model, "group_size 48 does not divide the 64 inputs", scheme=scheme(group_size=48))
    assert "model.layers.0.self_attn.q_proj" in message
    assert "more" in message
    assert "sizes that fit: 64, 32, 16, 8" in message
    assert "down_proj" not in message  # 96 = 2 * 48
    message = refused(model, "group_size 64 does not divide the 96 inputs", scheme=scheme(group_size=64))
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" in message
    assert "sizes that fit: 96, 48, 32, 16, 8" in message
    # The presets have groups of 128: both widths are named at once.
    message = refused(model, "group_size 128 does not divide", scheme="W4A16")
    assert "the 64 inputs" in message
    assert "the 96 inputs" in message


def test_two_schemes_on_different_layers(model):
    groups = {"attention": scheme("re:.*self_attn.*", bits=8), "rest": scheme("re:.*mlp.*", bits=3)}
    found = resolved(model, config_groups=groups)
    assert {n: b for n, b in found.items() if "self_attn" in n} == {n: 8 for n in found if "self_attn" in n}
    assert {n: b for n, b in found.items() if "mlp" in n} == {n: 3 for n in found if "mlp" in n}
    assert "lm_head" not in found


def test_first_group_that_matches_wins(model):
    down = "re:.*down_proj$"
    found = resolved(model, config_groups={"a": scheme(down, bits=8), "b": scheme("Linear", bits=4)})
    assert {b for n, b in found.items() if n.endswith("down_proj")} == {8}
    assert {b for n, b in found.items() if not n.endswith("down_proj")} == {4}
    found = resolved(model, config_groups={"b": scheme("Linear", bits=4), "a": scheme(down, bits=8)})
    assert set(found.values()) == {4}


def test_preset_names():
    wide = nn.Sequential(nn.Linear(128, 8))
    found = QuantizationModifier(scheme="W8A16").resolve_schemes(wide)["0"].weights
    assert (found.num_bits, found.symmetric) == (8, True)
    found = QuantizationModifier(scheme="W4A16_ASYM").resolve_schemes(wide)["0"].weights
    assert (found.num_bits, found.symmetric, found.group_size) == (4, False, 128)
    two = nn.Sequential(nn.Linear(128, 8), nn.ReLU(), nn.Linear(128, 8))
    assert resolved(two, scheme={"W8A16": ["2"], "W4A16": ["Linear"]}) == {"0": 4, "2": 8}
    with pytest.raises(BitpressError, match="re:nothing"):
        resolved(two, scheme={"W8A16": ["re:nothing"], "W4A16": ["Linear"]})


def test_unknown_preset_names_the_nearest():
    with pytest.raises(BitpressError, match=r"did you mean 'W4A16'\?"):
        QuantizationModifier(scheme="W4A17")
    with pytest.raises(BitpressError, match="W4A16_ASYM"):
        QuantizationModifier(scheme={"W4A16_ASIM": ["Linear"]})


def test_unknown_field_names_the_nearest():
    with pytest.raises(BitpressError, match=r"QuantizationModifier has no field 'ignored'; did you mean 'ignore'\?"):
        QuantizationModifier(ignored=["lm_head"])
    with pytest.raises(BitpressError, match="targets"):
        QuantizationModifier(targets=3)


def test_scheme_is_stated_once(model):
    refused(model, "states no scheme")
    refused(model, "scheme or config_groups, not both", scheme=PER_CHANNEL, config_groups={"g": scheme()})


def test_tied_head_is_left_alone_with_a_warning(caplog):
    model = tiny.llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.clone()
    with caplog.at_level(logging.WARNING):
        session = tiny.compress(model, [QuantizationModifier(scheme=PER_CHANNEL)])
    assert "lm_head shares its weight with model.embed_tokens and is left alone" in caplog.text
    assert "lm_head" not in session.state.schemes
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_scheme_without_weights_is_refused(model):
    refused(model, "'g' has no weights", config_groups={"g": QuantizationScheme(targets=["Linear"])})


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 8, "type": "float", "symmetric": False},
        {"num_bits": 4, "strategy": "token", "dynamic": True},
        {"num_bits": 16},
        {"num_bits": 1},
    ],
)
def test_grids_that_are_not_supported_are_refused(model, weights):
    group = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    refused(model, "config group 'g': weights: .* not supported", config_groups={"g": group})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite(value):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    message = refused(model, "NaN or infinite", scheme=PER_CHANNEL)
    assert "model.layers.1.mlp.up_proj.weight holds 1 " in message


def test_weight_dtype_that_cannot_be_stored():
    refused(tiny.llama().double(), "float64: load the model in float32, float16 or bfloat16", scheme=PER_CHANNEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_alone_it_is_round_to_nearest(family, symmetric, dtype):
    model = tiny.FAMILIES[family]().to(dtype)
    before = {n: weight_matrix(m).clone() for n, m in tiny.linears(model).items()}
    others = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = grid(symmetric=symmetric)
    modifier = QuantizationModifier(scheme=QuantizationScheme(targets=["Linear", "Conv1D"], weights=args),
                                    ignore=["re:.*attn.*"])  # fmt: skip
    session = tiny.compress(model, [modifier])
    assert session.pipeline == "datafree"
    assert session.state.schemes
    for name, layer in tiny.linears(model).items():
        expected = before[name]
        if name in session.state.schemes:
            expected = round_to_nearest(expected, args, dtype).dequantize()
            assert not torch.equal(expected, before[name])
            del others[f"{name}.weight"]
        assert torch.equal(weight_matrix(layer), expected)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], value) for n, value in others.items())


def test_two_modifiers_must_agree_where_they_overlap():
    first = QuantizationModifier(targets=["re:.*mlp.*"], scheme=scheme(bits=8))
    same = QuantizationModifier(targets=["re:.*mlp.*"], scheme=scheme(bits=8))
    other = QuantizationModifier(targets=["re:.*up_proj$"], scheme=scheme(bits=4))
    message = refused(tiny.llama(), "disagree about the weights of model.layers.0.mlp.up_proj", first, other)
    assert "8 bits" in message
    assert "4 bits" in message
    session = Session(tiny.llama(), [first, same])
    session.check()
    assert all(owner is same for owner in session.state.owners.values())
    apart = QuantizationModifier(targets=["re:.*self_attn.*"], scheme=scheme(bits=4))
    model = tiny.llama()
    tiny.compress(model, [first, apart])
    assert model.model.layers[0].mlp.up_proj.quantization_scheme.weights.num_bits == 8
    assert model.model.layers[0].self_attn.q_proj.quantization_scheme.weights.num_bits == 4


def test_a_quantized_model_is_not_quantized_again():
    model = tiny.llama()
    tiny.compress(model, [QuantizationModifier(scheme=PER_CHANNEL)])
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match="quantized already"):
        tiny.compress(model, [QuantizationModifier(scheme=PER_CHANNEL)])
    tiny.assert_unchanged(model, before)


def test_figures_of_every_layer():
    session = tiny.compress(tiny.llama(), [QuantizationModifier(scheme=scheme(bits=4), ignore=["lm_head"])])
    assert set(session.state.layer_records) == set(session.state.schemes)
    coarse = tiny.compress(tiny.llama(), [QuantizationModifier(scheme=scheme(bits=2), ignore=["lm_head"])])
    for name, figures in session.state.layer_records.items():
        assert figures["bits"] == 4
        assert 0 < figures["weight_error"] < coarse.state.layer_records[name]["weight_error"] < 1
