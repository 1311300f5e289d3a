"""AWQModifier: smoothing leaves the function as it was, helps quantization, and refuses what is not valid."""

import logging

import pytest
import tiny
import torch
from known_mappings import KNOWN, used
from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.linears import weight_matrix
from bitpress.modifiers import AWQMapping, AWQModifier, QuantizationModifier, register_mappings
from bitpress.modifiers import mappings as registry
from bitpress.quantization import QuantizationArgs, QuantizationScheme

UP_DOWN = AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])


def scheme(*targets, bits=4, symmetric=False, group_size=32):
    weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, group_size=group_size)
    return QuantizationScheme(targets=list(targets) or ["Linear", "Conv1D"], weights=weights)


def quantizer(ignore=(), fused=True, **options):
    groups = {"g": scheme("re:.*(layers?|h)\\.\\d.*", **options)}
    return QuantizationModifier(config_groups=groups, ignore=list(ignore), fused=fused)


def awq(**options):
    return AWQModifier(**{"bits": 4, "symmetric": False, "group_size": 32, "ignore": ["lm_head"], **options})


def refused(model, match, *modifiers):
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match=match) as error:
        tiny.compress(model, list(modifiers), tiny.token_data(2))
    tiny.assert_unchanged(model, before)
    return str(error.value)


def with_outliers(model):
    """A few channels of every norm are fifty times as large: what AWQ was made for."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[::17] *= 50
    return model


@pytest.fixture
def _registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTRY", {})


@pytest.fixture
def _only_smoothing(monkeypatch):
    monkeypatch.setattr(QuantizationModifier, "on_block", lambda *_: None)


@pytest.mark.usefixtures("_only_smoothing")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_smoothing_leaves_the_function_as_it_was(family):
    model = tiny.FAMILIES[family]()
    before, expected = tiny.snapshot(model), tiny.logits(model)
    session = tiny.compress(model, [awq(), quantizer(ignore=["re:.*project_.*"])], tiny.token_data(2))
    records = session.state.mapping_records
    depth = model.config.num_hidden_layers
    assert len(records) == depth * len(used(family))
    assert sum(r["ratio"] is not None for r in records) > len(records) / 2, "hardly anything was smoothed"
    assert any(not tiny.same_bits(before[n], v) for n, v in model.state_dict().items())
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.usefixtures("_only_smoothing")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon_new"])
def test_smoothing_in_half_precision_costs_no_more_than_rounding(family, dtype):
    model = tiny.FAMILIES[family]().to(dtype)
    expected = tiny.logits(tiny.FAMILIES[family]().to(dtype).float())
    rounding = (tiny.logits(model) - expected).norm()
    tiny.compress(model, [awq(), quantizer()], tiny.token_data(2))
    assert (tiny.logits(model) - expected).norm() < 4 * rounding


@pytest.mark.usefixtures("_only_smoothing")
def test_fused_channels_that_are_no_values_stay_as_they_are():
    model = tiny.gpt2()
    before = tiny.snapshot(model)
    mapping = AWQMapping("re:.*attn.c_attn$", ["re:.*attn.c_proj$"])
    tiny.compress(model, [awq(mappings=[mapping]), quantizer()], tiny.token_data(2))
    after, name = model.state_dict(), "transformer.h.0.attn.c_attn"
    values = slice(2 * tiny.WIDTH, None)
    assert torch.equal(after[f"{name}.weight"][:, : values.start], before[f"{name}.weight"][:, : values.start])
    assert torch.equal(after[f"{name}.bias"][: values.start], before[f"{name}.bias"][: values.start])
    assert not torch.equal(after[f"{name}.weight"][:, values], before[f"{name}.weight"][:, values])
    assert not torch.equal(after[f"{name}.bias"][values], before[f"{name}.bias"][values])


@pytest.mark.parametrize(
    ("stated", "found"),
    [({"bits": 8}, "bits=4"), ({"symmetric": True}, "symmetric=False"), ({"group_size": 64}, "group_size=32"),
     ({"group_size": -1}, "group_size=32")],
)  # fmt: skip
def test_disagreement_with_the_quantizer(stated, found):
    field, value = next(iter(stated.items()))
    message = refused(tiny.llama(), f"AWQModifier states {field}={value}", AWQModifier(**stated), quantizer())
    assert found in message
    assert "model.layers.0.self_attn.q_proj" in message


def test_disagreement_with_its_own_scheme():
    both = AWQModifier(bits=8, scheme=scheme())
    refused(tiny.llama(), "AWQModifier states bits=8, but the scheme of its own", both)


def test_agreement_in_any_words():
    per_channel = QuantizationModifier(scheme=scheme("re:.*layers.*", group_size=-1))
    tiny.compress(tiny.llama(), [AWQModifier(bits=4, symmetric=False, group_size=-1), per_channel], tiny.token_data(1))
    tiny.compress(tiny.llama(), [AWQModifier(), quantizer(bits=3)], tiny.token_data(1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_alone_it_gives_what_it_gives_with_a_quantizer(family):
    ignore = ["re:cls.*"] if family == "bert" else ["lm_head"]
    group = scheme("Conv1D" if family == "gpt2" else "Linear")
    recipes = {
        "both": [AWQModifier(bits=4), QuantizationModifier(scheme=group, ignore=ignore)],
        "bits": [awq(ignore=ignore)],
        "scheme": [AWQModifier(scheme=group, ignore=ignore)],
        "groups": [AWQModifier(config_groups={"g": group}, ignore=ignore)],
    }
    weights = {}
    for name, recipe in recipes.items():
        model = tiny.FAMILIES[family]()
        session = tiny.compress(model, recipe, tiny.token_data(2))
        assert session.pipeline == "sequential"
        assert len(session.state.schemes) == len(tiny.linears(model)) - (2 if family == "bert" else 1)
        weights[name] = tiny.snapshot(model)
    for name in ("bits", "scheme", "groups"):
        assert all(torch.equal(weights[name][n], v) for n, v in weights["both"].items()), name


def test_bits_alone_state_the_usual_groups():
    model = tiny.llama(hidden_size=128, intermediate_size=128)
    session = tiny.compress(model, [AWQModifier(bits=4, ignore=["lm_head"])], tiny.token_data(1))
    args = {s.weights.model_dump_json() for s in session.state.schemes.values()}
    assert len(args) == 1
    weights = next(iter(session.state.schemes.values())).weights
    assert (weights.num_bits, weights.symmetric, weights.group_size) == (4, True, 128)


@pytest.mark.parametrize("modifier", [AWQModifier(), AWQModifier(symmetric=False, group_size=32)])
def test_without_any_scheme(modifier):
    message = refused(tiny.llama(), "scheme", modifier)
    assert "config_groups" in message


def test_without_data():
    model = tiny.llama()
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match="AWQModifier needs calibration data, but no dataset was given"):
        tiny.compress(model, [awq()])
    with pytest.raises(BitpressError, match="AWQModifier needs calibration data, but the datafree pipeline has none"):
        tiny.compress(model, [awq()], tiny.token_data(1), pipeline="datafree")
    tiny.assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("field", "nearest"),
    [("groupsize", "group_size"), ("mapping", "mappings"), ("num_bits", "bits"), ("ngrid", "n_grid")],
)
def test_unknown_field_names_the_nearest(field, nearest):
    with pytest.raises(BitpressError, match=f"AWQModifier has no field '{field}'; did you mean '{nearest}'"):
        AWQModifier(**{field: 4})


@pytest.mark.parametrize(
    "fields", [{"bits": 1}, {"bits": 9}, {"bits": "four"}, {"n_grid": 0}, {"duo_scaling": "some"}, {"mappings": 3}]
)
def test_wrong_values_name_the_field(fields):
    with pytest.raises(BitpressError, match=next(iter(fields))):
        AWQModifier(**fields)


def test_mappings_may_be_pairs():
    pair = AWQModifier(mappings=[["re:.*up_proj$", ["re:.*down_proj$"]], (UP_DOWN.smooth_layer, ("re:.*down_proj$",))])
    assert [str(m) for m in pair.mappings] == [str(UP_DOWN)] * 2


@pytest.mark.parametrize(
    "mapping",
    [
        AWQMapping("re:.*ln_1$", ["re:.*up_proj$"]),
        AWQMapping("re:.*input_layernorm$", ["re:.*c_fc$"]),
        AWQMapping("re:.*mlp.act_fn$", ["re:.*down_proj$"]),
        AWQMapping("model.norm", ["lm_head"]),
    ],
)
def test_a_mapping_of_the_user_that_fits_no_block(mapping):
    message = refused(tiny.llama(), "fits no block", awq(mappings=[UP_DOWN, mapping]))
    assert str(mapping) in message


def test_a_mapping_of_the_user_that_fits_in_part():
    mapping = AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*key_proj$"])
    message = refused(tiny.llama(), "matches no linear layer", awq(mappings=[mapping]))
    assert "'re:.*key_proj$'" in message
    assert "model.layers.0" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "mapping"),
    [
        ("llama", AWQMapping("re:.*gate_proj$", ["re:.*down_proj$"])),
        ("llama", AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$"])),
        ("gpt2", AWQMapping("re:.*c_fc$", ["re:.*mlp.c_proj$"])),
        ("bert", AWQMapping("re:.*attention.output.LayerNorm$", ["re:.*intermediate.dense$"])),
    ],
)
def test_a_mapping_of_the_user_that_fails_its_proof(family, mapping, dtype):
    model = tiny.FAMILIES[family]().to(dtype)
    good = [m for m in KNOWN[family] if m.smooth_layer != mapping.smooth_layer]
    message = refused(model, "is not valid in", awq(mappings=[*good, mapping]))
    assert str(mapping) in message
    assert "(user)" in message
    assert "layers.0" in message or ".h.0" in message or "layer.0" in message
    number = float(message.split("moves by ")[1].split()[0])
    assert 0.1 < number < 100


def with_a_reader_of_its_norm():
    """A model in whose second block something else reads the output of a norm, too."""
    model = tiny.llama()
    layer = model.model.layers[1].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + x
    return model


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("source", ["user", "registry"])
def test_a_wrong_mapping_of_a_later_block_is_found(source):
    register_mappings("LlamaForCausalLM", KNOWN["llama"])
    stated = {"mappings": KNOWN["llama"]} if source == "user" else {}
    message = refused(with_a_reader_of_its_norm(), r"is not valid in model\.layers\.1", awq(**stated))
    assert "post_attention_layernorm" in message
    assert f"({source})" in message


@pytest.mark.usefixtures("_only_smoothing")
def test_discovery_leaves_out_what_does_not_hold_in_a_later_block():
    model = with_a_reader_of_its_norm()
    expected = tiny.logits(model)
    session = tiny.compress(model, [awq()], tiny.token_data(2))
    smooths = [r["smooth_layer"].removeprefix("model.layers.") for r in session.state.mapping_records]
    assert smooths == [
        "0.input_layernorm", "0.self_attn.v_proj", "0.post_attention_layernorm", "0.mlp.up_proj",
        "1.input_layernorm", "1.self_attn.v_proj", "1.mlp.up_proj",
    ]  # fmt: skip
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon_new", "opt_post_norm", "bert"])
def test_the_weights_are_the_same_whoever_states_the_mappings(family):
    weights = {}
    for source in ("discovery", "user", "registry"):
        model = tiny.FAMILIES[family]()
        stated = KNOWN[family] if source == "user" else None
        if source == "registry":
            register_mappings(type(model).__name__, KNOWN[family])
        session = tiny.compress(
            model, [awq(mappings=stated), quantizer(ignore=["re:.*project_.*"])], tiny.token_data(2)
        )
        assert {r["source"] for r in session.state.mapping_records} == {source}
        weights[source] = tiny.snapshot(model)
    for source in ("user", "registry"):
        assert all(torch.equal(weights[source][n], v) for n, v in weights["discovery"].items()), source


class SquaredReLU(nn.Module):
    """As the MLPs of Primer and Nemotron."""

    def __init__(self):
        super().__init__()
        self.norm, self.up_proj, self.down_proj = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down_proj(self.up_proj(self.norm(x)).relu().square())


@pytest.mark.usefixtures("_only_smoothing")
@pytest.mark.parametrize("stated", [None, [UP_DOWN]])
def test_half_of_a_scale_is_moved_over_a_squared_relu(stated):
    model = tiny.seeded(lambda: nn.Sequential(SquaredReLU(), SquaredReLU(), nn.Linear(32, 4)))
    batches = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        for block in list(model)[:2]:
            block.up_proj.weight[::7] *= 20  # channels that stand out, for AWQ to scale
        before, expected = tiny.snapshot(model), model(batches[0])
        session = tiny.compress(model, [AWQModifier(bits=4, group_size=32, mappings=stated)], tiny.data_of(batches))
        torch.testing.assert_close(model(batches[0]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert [r["smooth_layer"] for r in session.state.mapping_records if "up_proj" in r["smooth_layer"]] == [
        "0.up_proj",
        "1.up_proj",
    ]
    after = model.state_dict()
    for i in range(2):
        at_inputs = (after[f"{i}.down_proj.weight"] / before[f"{i}.down_proj.weight"]).mean(0)
        at_outputs = before[f"{i}.up_proj.bias"] / after[f"{i}.up_proj.bias"]
        torch.testing.assert_close(at_outputs.square(), at_inputs, rtol=1e-3, atol=1e-6)
        assert float(at_inputs.max() / at_inputs.min()) > 1.1, "nothing was smoothed"


def test_a_model_of_no_family_with_mappings_of_the_user():
    model = tiny.MLP(32, 32, 8)
    data = tiny.data_of([torch.randn(4, 32)])
    session = tiny.compress(
        model, [AWQModifier(bits=4, group_size=32, mappings=[AWQMapping("net.0", ["net.2"])])], data
    )
    assert [r["smooth_layer"] for r in session.state.mapping_records] == ["net.0"]


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_error_is_not_above_that_of_round_to_nearest(group_size, symmetric):
    """Per layer, and at the end, on the calibration data and with channels that stand out."""
    data = tiny.token_data(2)
    batch = data.batches[0].kwargs
    exact = tiny.logits(with_outliers(tiny.llama()), batch)
    group = scheme("re:.*layers.*", bits=3, symmetric=symmetric, group_size=group_size)
    errors = {}
    for name, recipe in {"awq": [AWQModifier(scheme=group)], "rtn": [QuantizationModifier(scheme=group)]}.items():
        model = with_outliers(tiny.llama())
        session = tiny.compress(model, recipe, data)
        errors[name] = float((tiny.logits(model, batch) - exact).norm())
        for record in session.state.mapping_records:
            assert record["error"] <= record["error_before"]
    assert errors["awq"] < errors["rtn"]


def test_records_say_what_was_done():
    session = tiny.compress(with_outliers(tiny.llama()), [awq()], tiny.token_data(2))
    records = session.state.mapping_records
    assert [r["smooth_layer"] for r in records[:4]] == [
        f"model.layers.0.{n}"
        for n in ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")
    ]
    assert records[1]["balance_layers"] == ["model.layers.0.self_attn.o_proj"]
    assert all(r["source"] == "discovery" and r["proof"] <= 1e-4 for r in records)
    assert all(r["ratio"] is None or 0 <= r["ratio"] < 1 for r in records)
    for figures in session.state.layer_records.values():
        assert 0 < figures["relative_error"] < 1


def test_statistics_follow_the_scales():
    """After smoothing, a layer's recorded output error is that of its new weight on its new input."""
    seen = {}

    class Witness(QuantizationModifier):
        def on_block(self, state, block):
            for name, statistics in state.statistics.items():
                if name in block.layers:
                    seen[name] = (statistics.gram.clone(), weight_matrix(block.layers[name]).clone())

    model = tiny.llama()
    before = {n: weight_matrix(m).clone() for n, m in tiny.linears(model).items()}
    fresh = {}

    class Early(Witness):
        def on_block(self, state, block):
            super().on_block(state, block)
            fresh.update(seen)
            seen.clear()

    group = scheme("re:.*layers.0.*")
    tiny.compress(model, [Early(scheme=group), AWQModifier(), Witness(scheme=group)], tiny.token_data(2))
    assert len(seen) == 7
    changed = 0
    for name, (gram, weight) in seen.items():
        old, _ = fresh[name]
        # Signal and its Gram matrix: X W^T is as it was, but for the producer's own scale on v and up.
        after = torch.linalg.vecdot(weight @ gram, weight)
        expected = torch.linalg.vecdot(before[name] @ old, before[name])
        if name.endswith(("v_proj", "up_proj")):
            continue
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-6)
        changed += not torch.equal(weight, before[name])
    assert changed >= 3


def test_targets_and_ignore_choose_what_is_smoothed():
    chosen = AWQModifier(targets=["re:.*mlp.*"])
    session = tiny.compress(tiny.llama(), [chosen, quantizer()], tiny.token_data(1))
    assert {r["smooth_layer"].rpartition(".")[2] for r in session.state.mapping_records} == {
        "post_attention_layernorm",
        "up_proj",
    }


def test_a_balance_layer_that_is_not_quantized_is_scaled_all_the_same():
    model = tiny.llama()
    expected = tiny.logits(model)
    recipe = [AWQModifier(), quantizer(ignore=["re:.*k_proj$", "re:.*gate_proj$"], fused=False, bits=8)]
    tiny.compress(model, recipe, tiny.token_data(2))
    # Eight bits: were k or gate left behind, the logits would be far off.
    assert float((tiny.logits(model) - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("apart", ["0", "1"])
def test_a_block_of_which_less_is_quantized_tells_nothing_of_the_others(apart):
    """All blocks are of one structure; of one the MLP is left as it is."""
    recipe = [AWQModifier(), quantizer(ignore=[f"re:.*layers.{apart}.mlp.*"])]
    session = tiny.compress(tiny.llama(num_hidden_layers=3), recipe, tiny.token_data(1))
    attention, mlp = {"input_layernorm", "v_proj"}, {"post_attention_layernorm", "up_proj"}
    for block in range(3):
        names = {r["smooth_layer"] for r in session.state.mapping_records if f"layers.{block}." in r["smooth_layer"]}
        assert {n.rpartition(".")[2] for n in names} == (attention if str(block) == apart else attention | mlp)


def test_smoothing_is_skipped_where_nothing_is_quantized():
    recipe = [AWQModifier(), quantizer(ignore=["re:.*layers.0.*"])]
    session = tiny.compress(tiny.llama(), recipe, tiny.token_data(1))
    assert {r["smooth_layer"].split(".")[2] for r in session.state.mapping_records} == {"1"}


def test_a_dead_channel_and_a_zero_row():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
        model.model.layers[0].mlp.up_proj.weight[5] = 0
        model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
        model.model.layers[1].self_attn.v_proj.weight.zero_()
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = 1.0
    tiny.compress(model, [awq()], tiny.token_data(1))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


class Routed(nn.Module):
    """Experts of which each token sees one; the third is for tokens that are rare."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Linear(32, 32)
            self.down_proj = nn.Linear(32, 32)

        def forward(self, x):
            return self.down_proj(self.up_proj(x).relu())

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Routed.Expert() for _ in range(3))

        def forward(self, x):
            chosen = (x[:, 0] > 0).long() + (x[:, 0] > 50).long()
            out = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows = chosen == index
                if rows.any():
                    out[rows] = expert(x[rows])
            return x + out

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Routed.Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize("late", [False, True])
def test_an_expert_that_did_not_run_in_the_dry_run_is_left_alone(late, pipeline, caplog):
    model = tiny.seeded(Routed)
    batches = [torch.randn(64, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    if late:
        batches[1][0, 0] = 1000.0
    modifier = AWQModifier(bits=4, group_size=32, mappings=[UP_DOWN])
    before = tiny.snapshot(model)
    with caplog.at_level(logging.WARNING):
        session = tiny.compress(model, [modifier], tiny.data_of(batches), pipeline=pipeline)
    smoothed = {r["smooth_layer"] for r in session.state.mapping_records}
    assert smoothed == {f"layers.{i}.experts.{j}.up_proj" for i in range(2) for j in range(2)}
    assert "left alone" in caplog.text
    # It is quantized, though.
    assert not torch.equal(model.layers[0].experts[2].up_proj.weight, before["layers.0.experts.2.up_proj.weight"])
