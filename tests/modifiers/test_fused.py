"""Layers that servers fuse have one scheme, or the recipe is refused before anything is computed."""

import pytest
import tiny
import torch
from compressing import scheme, token_ids
from transformers import AutoModelForCausalLM

from bitpress import BitpressError, oneshot
from bitpress.modifiers import AWQModifier, GPTQModifier, QuantizationModifier
from bitpress.modifiers.fused import FUSED, fused_by_servers
from bitpress.session import Session

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FOUR, EIGHT = (lambda *targets: scheme(4, targets=targets)), (lambda *targets: scheme(8, targets=targets))


def check(*modifiers, family="llama"):
    session = Session(tiny.FAMILIES[family](), list(modifiers))
    session.check()
    return session.state


def by_name(**fields):
    return QuantizationModifier(**{"ignore": ["lm_head"], **fields})


SPLIT = {
    "ignored": ([by_name(scheme=scheme(), ignore=["re:.*k_proj$", "lm_head"])], ATTENTION, "k_proj (left alone)"),
    "not targeted": ([by_name(scheme=scheme(targets=["re:.*up_proj$"]))], MLP, "gate_proj (left alone)"),
    "two groups": (
        [by_name(config_groups={"a": FOUR("re:.*(gate|down|[qkvo])_proj$"), "b": EIGHT("re:.*up_proj$")})],
        MLP,
        "up_proj (8 bits, asymmetric, per group, groups of 32)",
    ),
    "two modifiers": (
        [by_name(scheme=FOUR("re:.*self_attn.q_proj$")), by_name(scheme=EIGHT("re:.*self_attn.(k|v|o)_proj$"))],
        ATTENTION,
        "v_proj (8 bits",
    ),
    "chosen, and ignored": (
        [by_name(choose_from=[scheme(3), scheme(4)], bits_per_weight=3.5, ignore=["re:.*v_proj$", "lm_head"])],
        ATTENTION,
        "k_proj (to be chosen) and v_proj (left alone)",
    ),
}


@pytest.mark.parametrize("case", SPLIT)
def test_a_recipe_that_splits_them_is_refused(case):
    modifiers, where, what = SPLIT[case]
    model = tiny.llama()
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError) as error:
        oneshot(model, token_ids(), modifiers, num_calibration_samples=6)
    tiny.assert_unchanged(model, before)
    message = str(error.value)
    assert message.startswith(f"{where}: servers such as vLLM make one layer of ")
    assert what in message
    assert "(and in 1 more)" in message  # the other block
    assert "fused=False" in message


@pytest.mark.parametrize("case", SPLIT)
def test_it_may_be_allowed(case):
    modifiers = [m.model_copy(update={"fused": False}) for m in SPLIT[case][0]]
    assert check(*modifiers).schemes


def test_what_was_allowed_is_read_by_transformers(tmp_path):
    model = oneshot(
        tiny.llama(), None, by_name(scheme=scheme(), ignore=["re:.*(k|gate)_proj$", "lm_head"], fused=False)
    )
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), tiny.logits(model))


@pytest.mark.parametrize(
    "modifiers",
    [
        [by_name(config_groups={"a": FOUR("re:.*self_attn.*"), "b": EIGHT("re:.*mlp.*")})],
        [by_name(scheme=scheme(), ignore=["re:.*layers.0.*", "lm_head"])],
        [by_name(scheme=scheme(), ignore=["re:.*o_proj$", "re:.*down_proj$", "lm_head"])],
        [by_name(scheme=FOUR("re:.*(q|v)_proj$")), by_name(scheme=FOUR("re:.*k_proj$"))],
        [AWQModifier(), GPTQModifier(choose_from=[scheme(3), scheme(4)], bits_per_weight=3.5, ignore=["lm_head"])],
    ],
    ids=["a scheme each for attention and MLP", "a block", "what is not fused", "the same twice", "chosen"],
)
def test_whole_groups_may_differ(modifiers):
    assert check(*modifiers).schemes


def test_models_without_such_layers():
    assert fused_by_servers(tiny.gpt2()) == []
    assert fused_by_servers(tiny.MLP(4, 4)) == []
    assert fused_by_servers(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})) == []


def test_they_are_found_by_the_names_of_their_parent():
    found = fused_by_servers(tiny.llama(num_hidden_layers=1))
    assert found == [[f"{ATTENTION}.{x}_proj" for x in "qkv"], [f"{MLP}.{x}_proj" for x in ("gate", "up")]]
    plain = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("key", "query", "value", "other")})
    assert fused_by_servers(plain) == [["key", "query", "value"]]
    assert len({name for names in FUSED for name in names}) == sum(map(len, FUSED))
