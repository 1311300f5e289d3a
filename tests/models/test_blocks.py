"""Blocks: where a model is cut, and that no targeted layer is lost."""

import pytest
import tiny
import torch
from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import find_blocks


class Layer(nn.Module):
    def __init__(self, experts=0):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        if experts:
            self.experts = nn.ModuleList(Expert() for _ in range(experts))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(8, 8)


class Other(Layer):
    pass


class Stage(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))


class Model(nn.Module):
    """Whatever children it is given, in their order."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def layers(count=2, **options):
    return nn.ModuleList(Layer(**options) for _ in range(count))


def cut(model, sequential_targets=None, without=()):
    """Names of the blocks and of their layers, once it is sure that every layer is in one block."""
    targeted = {n: m for n, m in tiny.linears(model).items() if n not in without}
    blocks = find_blocks(model, targeted, sequential_targets)
    held = [name for block in blocks for name in block.layers]
    assert sorted(held) == sorted(targeted)
    modules = dict(model.named_modules())
    for block in blocks:
        assert block.module is modules[block.name]
        assert all(layer is targeted[name] for name, layer in block.layers.items())
    return {block.name: list(block.layers) for block in blocks}


def test_llama_is_cut_at_its_decoder_layers_and_the_head():
    found = cut(tiny.llama())
    assert list(found) == ["model.layers.0", "model.layers.1", "lm_head"]
    assert found["lm_head"] == ["lm_head"]
    assert found["model.layers.1"] == [
        f"model.layers.1.{name}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]  # fmt: skip


def test_untargeted_head_is_no_block():
    assert list(cut(tiny.llama(), without=["lm_head"])) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_a_block_per_layer(family):
    model = tiny.FAMILIES[family]()
    depth = model.config.num_hidden_layers
    deep = [names for names in cut(model).values() if len(names) > 1]
    assert len(deep) == depth
    assert len({len(names) for names in deep}) == 1


@pytest.mark.parametrize(
    "model",
    [
        tiny.MLP(8, 8, 8, 4),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)),
        Model(layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(3))),
        Model(only=nn.Linear(8, 8)),
    ],
)
def test_a_model_without_a_list_of_subnetworks_is_one_block(model):
    assert cut(model) == {"": list(tiny.linears(model))}


def test_linear_layer_itself_is_one_block():
    assert cut(nn.Linear(8, 8)) == {"": [""]}


def test_both_lists_of_an_encoder_and_a_decoder():
    model = Model(encoder=Model(layers=layers(2)), decoder=Model(layers=layers(3)), head=nn.Linear(8, 8))
    assert list(cut(model)) == [*(f"encoder.layers.{i}" for i in range(2)), *(f"decoder.layers.{i}" for i in range(3)),
                                "head"]  # fmt: skip


def test_sequential_of_one_class_is_a_list_and_a_mixed_one_is_not():
    assert list(cut(Model(body=nn.Sequential(Layer(), Layer())))) == ["body.0", "body.1"]
    assert list(cut(Model(body=nn.Sequential(Layer(), Other())))) == [""]
    assert list(cut(Model(body=nn.ModuleList([Layer(), Other()])))) == ["body.0", "body.1"]


def test_outermost_list_counts():
    # Experts are within a layer: they run, or not, as the layer says.
    found = cut(Model(layers=layers(2, experts=3)))
    assert list(found) == ["layers.0", "layers.1"]
    assert found["layers.0"] == ["layers.0.up", *(f"layers.0.experts.{i}.down" for i in range(3))]
    # A list of stages with layers of their own.
    found = cut(Model(stages=nn.ModuleList([Stage(1), Stage(3)])))
    assert {name: len(held) for name, held in found.items()} == {"stages.0": 1, "stages.1": 3}
    # A list of one is no cut.
    assert list(cut(Model(stages=nn.ModuleList([Stage(3)])))) == [f"stages.0.layers.{i}" for i in range(3)]


def test_layers_outside_of_blocks_are_blocks_in_model_order():
    model = Model(project_in=nn.Linear(8, 8), layers=layers(2), middle=nn.Linear(8, 8), more=layers(2))
    assert list(cut(model)) == ["project_in", "layers.0", "layers.1", "middle", "more.0", "more.1"]


def test_blocks_without_a_targeted_layer_are_left_out():
    model = Model(layers=layers(3), adapters=layers(2))
    without = ["layers.1.up", "adapters.0.up", "adapters.1.up"]
    assert list(cut(model, without=without)) == ["layers.0", "layers.2"]


def test_no_split_modules_go_before_lists():
    model = Model(stages=nn.ModuleList([Stage(1), Stage(2)]))
    model._no_split_modules = ["Layer"]
    assert list(cut(model)) == ["stages.0.layers.0", "stages.1.layers.0", "stages.1.layers.1"]
    model._no_split_modules = ["NoSuchClass"]
    assert list(cut(model)) == ["stages.0", "stages.1"]
    model._no_split_modules = None
    assert list(cut(model)) == ["stages.0", "stages.1"]


def test_no_split_modules_that_hold_one_another():
    model = Model(layers=layers(2, experts=2))
    model._no_split_modules = {"Layer", "Expert"}
    assert list(cut(model)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["Stage"], ["stages.0", "stages.1"]),
        (["Layer"], ["stages.0.layers.0", "stages.1.layers.0", "stages.1.layers.1"]),
        (["stages.1"], ["stages.0.layers.0.up", "stages.1"]),
        ("stages.1", ["stages.0.layers.0.up", "stages.1"]),
        (["re:stages.*layers.0$"], ["stages.0.layers.0", "stages.1.layers.0", "stages.1.layers.1.up"]),
        (["Stage", "Layer"], ["stages.0", "stages.1"]),
        (["stages.0", "Layer"], ["stages.0", "stages.1.layers.0", "stages.1.layers.1"]),
    ],
)
def test_sequential_targets_have_the_last_word(targets, expected):
    model = Model(stages=nn.ModuleList([Stage(1), Stage(2)]))
    model._no_split_modules = ["Layer"]
    assert list(cut(model, targets)) == expected


@pytest.mark.parametrize("targets", [["DecoderLayer"], ["LayerNorm"], ["re:.*no_such$"]])
def test_sequential_targets_that_hold_no_targeted_layer(targets):
    with pytest.raises(BitpressError, match="sequential_targets") as error:
        cut(Model(layers=layers(2)), targets)
    assert targets[0] in str(error.value)


def test_shared_layer_is_one_block():
    shared, own = Layer(), Layer()
    assert list(cut(Model(layers=nn.ModuleList([shared, own, shared])))) == ["layers.0", "layers.1"]


def test_cut_model_still_computes_the_same():
    model = tiny.llama()
    before = tiny.logits(model)
    find_blocks(model, tiny.linears(model))
    assert torch.equal(tiny.logits(model), before)
