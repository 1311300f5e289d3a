"""Mappings: which layers of a block they mean, and which family they are registered or excluded for."""

import pytest
import tiny
import torch
from known_mappings import EXCLUDED, KNOWN
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    Gemma3TextModel,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaModel,
    OPTModel,
)

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.modifiers import AWQMapping, register_mappings
from bitpress.modifiers import mappings as registry
from bitpress.modifiers.mappings import (
    exclude_mapping,
    reason_for_registration,
    registered_mappings,
    resolve_mapping,
    why_excluded,
)


@pytest.fixture
def _registry(monkeypatch):
    """What a test registers or excludes is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_EXCLUDED", {name: list(each) for name, each in registry._EXCLUDED.items()})


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(8, 8)
        self.down_proj = nn.Linear(8, 8)


class Layer(nn.Module):
    """A layer with its own pair, and experts with theirs."""

    def __init__(self, experts=3):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))
        self.shared = Expert()


class Decoder(nn.Module):
    """OPT's names: a final_layer_norm in every layer, and one behind them all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(OptLayer() for _ in range(2))
        self.final_layer_norm = nn.LayerNorm(8)


class OptLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.final_layer_norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 8)


def block_of(module, name=""):
    prefix = f"{name}." if name else ""
    return Block(name, module, {prefix + n: m for n, m in tiny.linears(module).items()})


def names(mapping, block):
    return {r.smooth_name: list(r.balance) for r in resolve_mapping(mapping, block, "user")}


UP_DOWN = AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])


@pytest.mark.parametrize("prefix", ["", "model.layers.7"])
def test_pairs_stay_within_their_expert(prefix):
    at = f"{prefix}." if prefix else ""
    assert names(UP_DOWN, block_of(Layer(), prefix)) == {
        **{f"{at}experts.{i}.up_proj": [f"{at}experts.{i}.down_proj"] for i in range(3)},
        f"{at}shared.up_proj": [f"{at}shared.down_proj"],
    }


def test_a_norm_goes_to_all_experts():
    found = names(AWQMapping("re:.*norm$", ["re:.*up_proj$"]), block_of(Layer(2), "l"))
    assert found == {"l.norm": ["l.experts.0.up_proj", "l.experts.1.up_proj", "l.shared.up_proj"]}


def test_the_modules_are_those_of_the_names():
    module = Layer()
    for resolved in resolve_mapping(UP_DOWN, block_of(module, "l"), "user"):
        assert resolved.smooth is module.get_submodule(resolved.smooth_name.removeprefix("l."))
        assert all(layer is module.get_submodule(n.removeprefix("l.")) for n, layer in resolved.balance.items())
        assert resolved.source == "user"
        assert resolved.channel_map is None


def test_norm_outside_of_the_blocks_does_not_match():
    model = Decoder()
    mapping = AWQMapping("re:.*final_layer_norm$", ["re:.*fc1$"])
    for i, layer in enumerate(model.layers):
        found = names(mapping, block_of(layer, f"layers.{i}"))
        assert found == {f"layers.{i}.final_layer_norm": [f"layers.{i}.fc1"]}
    # A block without balance layers has no mapping either.
    assert names(mapping, block_of(model.final_layer_norm, "final_layer_norm")) == {}


def test_an_ancestor_whose_name_only_begins_the_same_is_another():
    model = nn.ModuleDict({"a": Expert(), "ab": Expert()})
    assert names(UP_DOWN, block_of(model)) == {"a.up_proj": ["a.down_proj"], "ab.up_proj": ["ab.down_proj"]}


def test_patterns_are_names_class_names_and_regular_expressions():
    block = block_of(Layer(1), "l")
    assert names(AWQMapping("l.norm", ["l.shared.up_proj"]), block) == {"l.norm": ["l.shared.up_proj"]}
    assert names(AWQMapping("LayerNorm", ["re:.*shared.up_proj$"]), block) == {"l.norm": ["l.shared.up_proj"]}
    assert names(AWQMapping("re:.*norm$", ["re:.*up_proj$"]), block) == {
        "l.norm": ["l.experts.0.up_proj", "l.shared.up_proj"]
    }


def test_only_some_of_the_balance_layers_is_an_error():
    mapping = AWQMapping("re:.*norm$", ["re:.*up_proj$", "re:.*gate_proj$"])
    with pytest.raises(BitpressError) as error:
        resolve_mapping(mapping, block_of(Layer(), "model.layers.3"), "user")
    assert "gate_proj" in str(error.value)
    assert "model.layers.3" in str(error.value)
    assert str(mapping) in str(error.value)


def test_a_mapping_of_another_block_matches_nothing():
    block = block_of(Layer(), "l")
    assert names(AWQMapping("re:.*ln_1$", ["re:.*up_proj$"]), block) == {}
    assert names(AWQMapping("re:.*norm$", ["re:.*c_fc$"]), block) == {}
    # What has no channels absorbs nothing.
    assert names(AWQMapping("re:.*experts$", ["re:.*up_proj$"]), block) == {}


def test_a_layer_does_not_balance_itself():
    found = names(AWQMapping("re:.*up_proj$", ["re:.*(up|down)_proj$"]), block_of(Expert(), "e"))
    assert found == {"e.up_proj": ["e.down_proj"]}


def test_kind_is_that_of_the_structure():
    blocks = [block_of(layer, f"l.{i}") for i, layer in enumerate([Layer(), Layer(), Layer()])]
    blocks[2].module.shared.up_proj = nn.Linear(8, 16)
    kinds = [[r.kind(b) for r in resolve_mapping(UP_DOWN, b, "user")] for b in blocks]
    assert kinds[0] == kinds[1]
    assert len(set(kinds[0])) == 4
    assert kinds[0][:3] == kinds[2][:3]
    assert kinds[0][3] != kinds[2][3]


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("first", ["the class", "another of its family"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", LlamaModel), ("llama", LlamaForSequenceClassification), ("llama", LlamaForQuestionAnswering),
        ("gpt2", GPT2Model), ("gpt2", GPT2DoubleHeadsModel), ("gpt2", GPT2ForSequenceClassification),
        ("bert", BertModel), ("bert", BertForSequenceClassification), ("opt", OPTModel),
    ],
)  # fmt: skip
def test_a_family_is_registered_for_all_its_classes(family, kind, first):
    full = tiny.FAMILIES[family]()
    model = tiny.seeded(lambda: kind(full.config))
    register_mappings(kind.__name__ if first == "the class" else type(full).__name__, KNOWN[family], "for the test")
    assert registered_mappings(model) == registered_mappings(full) == KNOWN[family]
    assert reason_for_registration(model) == reason_for_registration(full) == "for the test"
    blocks = [b for b in tiny.probed_blocks(model) if len(b.layers) > 1]
    assert len(blocks) == full.config.num_hidden_layers
    assert all(len(resolve_mapping(m, b, "registry")) == 1 for m in registered_mappings(model) for b in blocks)


@pytest.mark.parametrize("model", [tiny.MLP(8, 8), nn.Linear(8, 8), Layer(), *(f() for f in tiny.FAMILIES.values())])
def test_no_model_is_registered_unless_somebody_does_so(model):
    assert registered_mappings(model) is None
    assert reason_for_registration(model) == ""


@pytest.mark.usefixtures("_registry")
def test_names_that_only_begin_like_a_family():
    class LlamaGuard(nn.Module):
        pass

    class GPT2J(nn.Module):
        pass

    class Gemma(nn.Module):
        pass

    for family in ("llama", "gpt2", "gemma2"):
        register_mappings(type(tiny.FAMILIES[family]()).__name__, KNOWN[family], "for the test")
    assert all(registered_mappings(kind()) is None for kind in (LlamaGuard, GPT2J, Gemma))
    assert all(reason_for_registration(kind()) == "" for kind in (LlamaGuard, GPT2J, Gemma))


@pytest.mark.usefixtures("_registry")
def test_register_a_list():
    class TestbedForCausalLM(nn.Module):
        pass

    class TestbedModel(nn.Module):
        pass

    assert registered_mappings(TestbedModel()) is None
    register_mappings("TestbedForCausalLM", [UP_DOWN])
    assert registered_mappings(TestbedForCausalLM()) == [UP_DOWN]
    assert registered_mappings(TestbedModel()) == [UP_DOWN]
    assert reason_for_registration(TestbedModel()) == ""
    # The class itself goes before its family, even with nothing.
    register_mappings("TestbedModel", [], "nothing helps")
    assert registered_mappings(TestbedForCausalLM()) == [UP_DOWN]
    assert registered_mappings(TestbedModel()) == []
    assert reason_for_registration(TestbedForCausalLM()) == ""
    assert reason_for_registration(TestbedModel()) == "nothing helps"


@pytest.mark.usefixtures("_registry")
def test_register_a_function_of_the_config():
    class TestbedForCausalLM(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    register_mappings("TestbedForCausalLM", lambda config: [UP_DOWN] * config)
    assert registered_mappings(TestbedForCausalLM(1)) == [UP_DOWN]
    assert registered_mappings(TestbedForCausalLM(3)) == [UP_DOWN] * 3


@pytest.mark.usefixtures("_registry")
def test_what_is_registered_last_counts():
    register_mappings("LlamaForCausalLM", KNOWN["llama"], "the first")
    register_mappings("LlamaForCausalLM", [UP_DOWN], "the second")
    assert registered_mappings(tiny.llama()) == [UP_DOWN]
    assert reason_for_registration(tiny.llama()) == "the second"
    register_mappings("LlamaForCausalLM", [UP_DOWN])
    assert reason_for_registration(tiny.llama()) == ""


@pytest.mark.usefixtures("_registry")
def test_the_caller_may_change_what_it_gets():
    register_mappings("LlamaForCausalLM", [UP_DOWN])
    registered_mappings(tiny.llama()).clear()
    assert registered_mappings(tiny.llama()) == [UP_DOWN]


def all_in(model):
    blocks = [b for b in tiny.probed_blocks(model) if len(b.layers) > 1]
    return [(m, r) for b in blocks for m in KNOWN["gemma3"] for r in resolve_mapping(m, b, "discovery")]


@pytest.mark.parametrize("kind", [None, Gemma3TextModel])
def test_what_the_library_excludes(kind):
    full = tiny.gemma3()
    model = full if kind is None else tiny.seeded(lambda: kind(full.config))
    found = all_in(model)
    assert len(found) == 4 * full.config.num_hidden_layers
    for mapping, resolved in found:
        why = why_excluded(model, resolved)
        assert (why is not None) is (mapping in EXCLUDED["gemma3"])
        assert why is None or "normed" in why
    # Qwen3, too, norms queries and keys; nobody has reported any harm.
    assert all(why_excluded(tiny.qwen3(), resolved) is None for _, resolved in found)


@pytest.mark.usefixtures("_registry")
def test_exclude_a_mapping():
    class TestbedForCausalLM(nn.Module):
        pass

    class TestbedModel(nn.Module):
        pass

    found = resolve_mapping(UP_DOWN, block_of(Layer(1), "l"), "discovery")
    norm = resolve_mapping(AWQMapping("re:.*norm$", ["re:.*up_proj$"]), block_of(Layer(1), "l"), "discovery")[0]
    exclude_mapping("TestbedForCausalLM", AWQMapping("re:.*experts.*up_proj$", ["re:.*down_proj$"]), "experts")
    exclude_mapping("TestbedForCausalLM", AWQMapping("re:.*norm$", ["re:.*shared.up_proj$"]), "never")
    for model in (TestbedForCausalLM(), TestbedModel()):
        assert [why_excluded(model, each) for each in found] == ["experts", None]
        # All balance layers have to match.
        assert why_excluded(model, norm) is None
    assert why_excluded(tiny.llama(), found[0]) is None


def test_the_registry_was_cleaned_up():
    assert registry._REGISTRY == {}
    assert not any(name.startswith("Testbed") for name in registry._EXCLUDED)


def test_a_mapping_is_shown_as_it_is_written():
    assert str(UP_DOWN) == "AWQMapping('re:.*up_proj$', ['re:.*down_proj$'])"
    assert eval(str(UP_DOWN), {"AWQMapping": AWQMapping}) == UP_DOWN  # noqa: S307


def test_tensors_do_not_leak_between_resolutions():
    block = block_of(Layer(), "l")
    first, second = (resolve_mapping(UP_DOWN, block, "user")[0] for _ in range(2))
    first.channel_map = torch.arange(8)
    assert second.channel_map is None


def test_one_balance_layer_needs_no_list():
    assert AWQMapping("a", "b") == AWQMapping("a", ["b"])
