"""Adapters: a model whose layers are wrapped by LoRA is refused with the way out."""

import pytest
import tiny
import torch
from compressing import awq, rtn, token_ids
from torch import nn

from bitpress import BitpressError, oneshot
from bitpress.models.lora import check_no_adapters

WRAPPED = "model.layers.1.self_attn.q_proj"


class LoRA(nn.Module):
    """As PEFT's layers: the base layer, and two narrow ones beside it."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def wrap(model, *names):
    for name in names:
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, LoRA(model.get_submodule(name)))
    return model


@pytest.mark.parametrize("recipe", [rtn(group_size=4), awq(group_size=4)], ids=["round to nearest", "awq"])
def test_a_wrapped_layer_is_refused_before_anything_is_computed(recipe, tmp_path):
    model = wrap(tiny.llama().train(), WRAPPED, "model.layers.1.mlp.up_proj")
    before, logits = tiny.snapshot(model), tiny.logits(model)
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(BitpressError) as error:
        oneshot(model, token_ids(), recipe, num_calibration_samples=6, output_dir=tmp_path / "out")
    assert f"{WRAPPED} is wrapped by LoRA" in str(error.value)
    assert "model.merge_and_unload()" in str(error.value)
    assert "model.unload()" in str(error.value)
    tiny.assert_unchanged(model, before)
    assert torch.equal(tiny.logits(model), logits)
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == attributes
    assert all(module.training for module in model.modules())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert list(tmp_path.iterdir()) == []


def test_a_wrapped_layer_is_refused_even_where_the_recipe_leaves_it_alone():
    model = wrap(tiny.llama(), WRAPPED)
    with pytest.raises(BitpressError, match="is wrapped by LoRA"):
        oneshot(model, None, rtn(["re:.*self_attn.*", "lm_head"]))


def test_the_way_out():
    """Merged, the model is taken."""
    model = wrap(tiny.llama(), WRAPPED)
    adapter = model.get_submodule(WRAPPED)
    with torch.no_grad():
        adapter.base_layer.weight += adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight
    expected = tiny.logits(wrap(tiny.llama()))
    model.model.layers[1].self_attn.q_proj = adapter.base_layer
    assert tiny.logits(model).ne(expected).any()
    oneshot(model, None, rtn())
    assert hasattr(model.get_submodule(WRAPPED), "quantization_scheme")


class HasParts(nn.Module):
    """Names that are LoRA's, in a module that is not."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    "parts",
    [{"base_layer": "a name", "lora_A": 3}, {"base_layer": nn.Linear(32, 32)}, {"lora_A": nn.Linear(32, 32)}],
    ids=["no module", "no adapter", "no base"],
)
def test_other_modules_with_such_names_are_taken(parts):
    model = HasParts(**parts)
    check_no_adapters(model)
    oneshot(model, None, rtn(()))
    assert hasattr(model.linear, "quantization_scheme")
