"""What a model's mappings are: the user's, those of the registry or what discovery finds, each one proven."""

import pytest
import tiny
import torch
from known_mappings import EXCLUDED, KNOWN, used
from torch import nn
from transformers import BertModel, GPT2Model, LlamaForSequenceClassification, LlamaModel

from bitpress.errors import BitpressError
from bitpress.modifiers import AWQMapping, AWQModifier, register_mappings
from bitpress.modifiers import mappings as registry
from bitpress.modifiers.mappings import exclude_mapping
from bitpress.modifiers.resolving import resolve_mappings

UP_DOWN = AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])
VALUES = AWQMapping("re:.*v_proj$", ["re:.*o_proj$"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """What a test registers or excludes is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTRY", {})
    monkeypatch.setattr(registry, "_EXCLUDED", {name: list(each) for name, each in registry._EXCLUDED.items()})


def resolve(model, **options):
    return resolve_mappings(model, tiny.probed_blocks(model), **options)


def facts(resolution):
    """All there is to know of the mappings but who stated them, and what exactly was measured."""
    return {
        name: [(m.smooth_name, set(m.balance), m.channel_map.tolist(), m.power) for m in found]
        for name, found in resolution.mappings.items()
    }


def sources(resolution):
    return {mapping.source for found in resolution.mappings.values() for mapping in found}


def smooths(resolution):
    return {m.smooth_name.rpartition(".")[2] for found in resolution.mappings.values() for m in found}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_user_the_registry_and_discovery_agree(family):
    model = tiny.FAMILIES[family]()
    before = tiny.snapshot(model)
    found = resolve(model)
    stated = resolve(model, stated=used(family))
    register_mappings(type(model).__name__, used(family))
    registered = resolve(model)
    assert (sources(found), sources(stated), sources(registered)) == ({"discovery"}, {"user"}, {"registry"})
    assert facts(found) == facts(stated) == facts(registered)
    assert sum(map(len, found.mappings.values())) == model.config.num_hidden_layers * len(used(family))
    assert found.kinds == stated.kinds == registered.kinds
    for resolution in (found, stated, registered):
        mappings = [m for each in resolution.mappings.values() for m in each]
        assert all(0 <= m.difference < 1e-4 for m in mappings)
        modules = dict(model.named_modules())
        assert all(m.smooth is modules[m.smooth_name] for m in mappings)
        assert all(layer is modules[name] for m in mappings for name, layer in m.balance.items())
        # Every layer is accounted for, once, whoever has stated the mappings.
        balanced = [name for m in mappings for name in m.balance]
        left = [name for each in resolution.left.values() for x in each for name in x.layers]
        assert sorted(balanced + left) == sorted(tiny.linears(model))
    tiny.assert_unchanged(model, before)


def test_the_user_goes_before_the_registry_and_that_before_discovery():
    model = tiny.llama()
    assert smooths(resolve(model)) == {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"}
    register_mappings("LlamaForCausalLM", [VALUES])
    assert (smooths(resolve(model)), sources(resolve(model))) == ({"v_proj"}, {"registry"})
    stated = resolve(model, stated=[UP_DOWN])
    assert (smooths(stated), sources(stated)) == ({"up_proj"}, {"user"})
    # To want none is a wish, too.
    assert smooths(resolve(model, stated=[])) == set()
    register_mappings("LlamaForCausalLM", [])
    assert smooths(resolve(model)) == set()


@pytest.mark.parametrize("mappings", [None, [UP_DOWN]])
def test_a_modifier_goes_by_the_same_order(mappings):
    register_mappings("LlamaForCausalLM", [VALUES])
    modifier = AWQModifier(bits=4, symmetric=False, group_size=32, ignore=["lm_head"], mappings=mappings)
    records = tiny.compress(tiny.llama(), [modifier], tiny.token_data(1)).state.mapping_records
    expected = {("registry", "v_proj")} if mappings is None else {("user", "up_proj")}
    assert {(r["source"], r["smooth_layer"].rpartition(".")[2]) for r in records} == expected


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", LlamaModel), ("llama", LlamaForSequenceClassification), ("gpt2", GPT2Model), ("bert", BertModel)],
)
def test_what_is_registered_for_one_class_serves_its_family(family, kind):
    full = tiny.FAMILIES[family]()
    model = tiny.seeded(lambda: kind(full.config))
    found = resolve(model)
    register_mappings(type(full).__name__, KNOWN[family])
    registered = resolve(model)
    assert (sources(found), sources(registered)) == ({"discovery"}, {"registry"})
    assert facts(found) == facts(registered)


@pytest.mark.parametrize(
    ("families", "choose"),
    [
        (("opt", "opt_post_norm"), lambda c: "opt" if c.do_layer_norm_before else "opt_post_norm"),
        (
            ("falcon", "falcon_new", "falcon_new_one_norm", "falcon_rw"),
            lambda c: "falcon_rw" if not c.parallel_attn
            else "falcon_new" if c.new_decoder_architecture and c.num_ln_in_parallel_attn != 1 else "falcon",
        ),
    ],
)  # fmt: skip
def test_a_function_of_the_config_is_registered(families, choose):
    for family in families:
        model = tiny.FAMILIES[family]()
        registry._REGISTRY.clear()
        found = resolve(model)
        register_mappings(type(model).__name__, lambda config: KNOWN[choose(config)])
        registered = resolve(model)
        assert sources(registered) == {"registry"}
        assert facts(registered) == facts(found)


def test_a_registered_mapping_that_fits_nothing_is_passed_over_and_a_wrong_one_is_not():
    model = tiny.llama()
    register_mappings("LlamaForCausalLM", [AWQMapping("re:.*ln_1$", ["re:.*c_fc$"]), UP_DOWN])
    assert smooths(resolve(model)) == {"up_proj"}
    register_mappings("LlamaForCausalLM", [UP_DOWN, AWQMapping("re:.*gate_proj$", ["re:.*down_proj$"])])
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match=r"\(registry\) is not valid in model\.layers\.0") as error:
        resolve(model)
    assert "AWQMapping('re:.*gate_proj$', ['re:.*down_proj$'])" in str(error.value)
    tiny.assert_unchanged(model, before)


@pytest.mark.parametrize("source", ["user", "registry"])
@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        # The norm feeds all three: apart, each of the two would be refuted, and with no word on what to do.
        (
            AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$"]),
            AWQMapping("re:.*input_layernorm$", ["re:.*v_proj$"]),
            "model.layers.0.input_layernorm",
        ),
        # By other patterns.
        (UP_DOWN, AWQMapping("re:.*layers.1.mlp.up_proj$", ["re:.*down_proj$"]), "model.layers.1.mlp.up_proj"),
    ],
)
def test_a_smooth_layer_of_two_mappings_is_refused(first, second, name, source):
    model = tiny.llama()
    before = tiny.snapshot(model)
    if source == "registry":
        register_mappings("LlamaForCausalLM", [VALUES, first, second])
    with pytest.raises(BitpressError, match="is the smooth layer of two mappings") as error:
        resolve(model, stated=[VALUES, first, second] if source == "user" else None)
    message = str(error.value)
    assert message.startswith(f"{name} ")
    assert str(first) in message
    assert str(second) in message
    assert str(VALUES) not in message
    tiny.assert_unchanged(model, before)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Stack(nn.Module):
    """Blocks with nothing between them but a ReLU: the last layer of one feeds the first of the next."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.ModuleList(Pair() for _ in range(2))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        for pair in self.pairs:
            x = pair(x).relu()
        return self.head(x)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = Stack()

    def forward(self, x):
        return self.stack(x)


ACROSS = AWQMapping("re:.*pairs.0.second$", ["re:.*pairs.1.first$"])


def test_a_mapping_that_joins_layers_of_different_blocks_is_refused():
    model = tiny.seeded(Tower)
    data = tiny.data_of([torch.randn(8, 32, generator=torch.Generator().manual_seed(0))])
    before = tiny.snapshot(model)
    within = AWQMapping("re:.*first$", ["re:.*second$"])
    modifier = AWQModifier(bits=4, group_size=32, mappings=[within, ACROSS])
    with pytest.raises(BitpressError, match="joins layers of different blocks") as error:
        tiny.compress(model, [modifier], data)
    message = str(error.value)
    assert message.startswith(str(ACROSS))
    assert "its smooth layer is in stack.pairs.0, its balance layers in stack.pairs.1" in message
    tiny.assert_unchanged(model, before)
    # It helps to do what it says.
    assert "sequential_targets" in message
    session = tiny.compress(model, [modifier], data, sequential_targets=["Stack"])
    assert [r["smooth_layer"] for r in session.state.mapping_records] == [
        "stack.pairs.0.first",
        "stack.pairs.1.first",
        "stack.pairs.0.second",
    ]


@pytest.mark.parametrize(
    ("mapping", "smooth", "balance"),
    [
        (
            AWQMapping("model.layers.0.mlp.down_proj", ["re:.*layers.1.self_attn.(q|k|v)_proj$"]),
            "model.layers.0",
            "model.layers.1",
        ),
        (AWQMapping("re:.*layers.1.mlp.down_proj$", ["lm_head"]), "model.layers.1", "lm_head"),
        # Of several blocks each: the first of them are named.
        (AWQMapping("re:.*mlp.down_proj$", ["lm_head"]), "model.layers.0", "lm_head"),
    ],
)
def test_the_blocks_that_a_mapping_joins_are_named(mapping, smooth, balance):
    with pytest.raises(BitpressError, match="joins layers of different blocks") as error:
        resolve(tiny.llama(), stated=[UP_DOWN, mapping])
    assert f"its smooth layer is in {smooth}, its balance layers in {balance}." in str(error.value)


def test_what_is_excluded_is_told_and_may_be_stated():
    model = tiny.gemma3()
    found = resolve(model)
    assert "input_layernorm" not in smooths(found)
    for block in range(model.config.num_hidden_layers):
        left = found.left[f"model.layers.{block}"]
        assert [sorted(n.rpartition(".")[2] for n in x.layers) for x in left] == [["k_proj", "q_proj", "v_proj"]]
        assert "normed" in left[0].why
    assert smooths(resolve(model, stated=EXCLUDED["gemma3"])) == {"input_layernorm"}
    register_mappings("Gemma3ForCausalLM", KNOWN["gemma3"])
    assert "input_layernorm" in smooths(resolve(model))


def test_users_may_exclude():
    exclude_mapping("LlamaForCausalLM", UP_DOWN, "for the test")
    model = tiny.llama()
    found = resolve(model)
    assert smooths(found) == {"input_layernorm", "v_proj", "post_attention_layernorm"}
    for block in range(2):
        name = f"model.layers.{block}"
        assert [(x.layers, x.why) for x in found.left[name]] == [((f"{name}.mlp.down_proj",), "for the test")]
