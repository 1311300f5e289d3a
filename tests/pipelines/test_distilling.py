"""Scales that are tuned until the compressed model predicts what the original does."""

import pytest
import tiny
import torch
from compressing import awq, rtn
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from bitpress import BitpressError, DistillationModifier, QuantizationModifier, save
from bitpress.checkpoints.attached import attached_layers, packed_weight
from bitpress.modifiers import LearnedRoundingModifier
from bitpress.session import Session

DATA = tiny.token_data(16)


@torch.no_grad()
def divergence(model, original, batches):
    losses = []
    for batch in batches:
        scores, expected = (tiny.logits(m, batch.kwargs).flatten(0, 1).log_softmax(-1) for m in (model, original))
        loss = nn.functional.kl_div(scores, expected, log_target=True, reduction="batchmean")
        losses.append(float(loss))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("before", [rtn(bits=3), awq(bits=3)], ids=["after rtn", "after awq"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.opt], ids=["llama", "opt"])
def test_the_model_comes_nearer_to_the_original_and_keeps_its_integers(before, build):
    plain, tuned = build(), build()
    tiny.compress(plain, before, DATA)
    session = tiny.compress(tuned, [*before, DistillationModifier(epochs=3, learning_rate=5e-3)], DATA)
    unseen = tiny.data_of([tiny.tokens(4, seed=100)]).batches
    assert divergence(tuned, build(), unseen) < 0.97 * divergence(plain, build(), unseen)
    others = attached_layers(plain)
    for name, layer in attached_layers(tuned).items():
        mine, theirs = packed_weight(name, layer).unpack(), packed_weight(name, others[name]).unpack()
        assert torch.equal(mine.values, theirs.values)
        assert torch.equal(mine.zero_point, theirs.zero_point)
        assert not torch.equal(mine.scale, theirs.scale)
    losses = session.state.distillation["held_out_loss"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_the_loss_is_that_of_the_model_before_and_after_on_the_batches_that_are_held_out():
    plain, tuned = tiny.llama(), tiny.llama()
    tiny.compress(plain, awq(bits=3), DATA)
    session = tiny.compress(
        tuned, [*awq(bits=3), DistillationModifier(epochs=1, held_out=0.25, learning_rate=5e-3)], DATA
    )
    losses = session.state.distillation["held_out_loss"]
    held_out = DATA.batches[-4:]
    assert losses[0] == pytest.approx(divergence(plain, tiny.llama(), held_out), rel=1e-3)
    assert losses[1] == pytest.approx(divergence(tuned, tiny.llama(), held_out), rel=1e-3)


def test_what_makes_it_worse_is_not_kept():
    plain, tuned = tiny.llama(), tiny.llama()
    tiny.compress(plain, rtn(bits=4), DATA)
    session = tiny.compress(tuned, [*rtn(bits=4), DistillationModifier(learning_rate=3.0)], DATA)
    before, after = session.state.distillation["held_out_loss"]
    assert after > before
    tiny.assert_unchanged(tuned, tiny.snapshot(plain))


def test_what_is_kept_for_the_way_back_changes_nothing_but_memory():
    found = []
    for recompute in (True, False):
        model = tiny.llama()
        tiny.compress(model, [*rtn(bits=3), DistillationModifier(gradient_checkpointing=recompute)], DATA)
        found.append(tiny.snapshot(model))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_padding_does_not_count():
    batches = []
    for seed in range(8):
        batch = tiny.tokens(2, seed=seed)
        batch["attention_mask"][1, 12:] = 0
        batches.append(batch)
    others = [{**b, "input_ids": torch.where(b["attention_mask"] == 1, b["input_ids"], 5)} for b in batches]
    found = []
    for data in (batches, others):
        model = tiny.llama()
        tiny.compress(model, [*rtn(bits=3), DistillationModifier()], tiny.data_of(data))
        found.append(tiny.snapshot(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


def test_experts_are_tuned_too():
    def build():
        config = MixtralConfig(**tiny._GATED, num_local_experts=4, num_experts_per_tok=2)
        return tiny.seeded(lambda: MixtralForCausalLM(config))

    plain, tuned = build(), build()
    tiny.compress(plain, rtn(bits=3), DATA)
    session = tiny.compress(tuned, [*rtn(bits=3), DistillationModifier(epochs=2, learning_rate=5e-3)], DATA)
    losses = session.state.distillation["held_out_loss"]
    assert losses[-1] < losses[0]
    experts = [name for name in attached_layers(tuned) if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    others = attached_layers(plain)
    assert any(not torch.equal(attached_layers(tuned)[n].weight_scale, others[n].weight_scale) for n in experts)


def test_a_plain_module_is_brought_nearer_to_its_own_output():
    x = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    model = tiny.seeded(lambda: tiny.MLP(32, 64, 64, 32))
    session = tiny.compress(model, [*rtn(bits=3), DistillationModifier(epochs=4, learning_rate=5e-3)], tiny.data_of(x))
    losses = session.state.distillation["held_out_loss"]
    assert min(losses[1:]) < 0.98 * losses[0]


@pytest.mark.parametrize("scheme", ["W8A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checkpoint_says_what_the_model_says(tmp_path, scheme, dtype):
    tiny.llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype).eval()
    recipe = [QuantizationModifier(scheme=scheme, ignore=["lm_head"]), DistillationModifier(learning_rate=5e-3)]
    tiny.compress(model, recipe, DATA)
    expected = tiny.logits(model)
    save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert torch.equal(tiny.logits(loaded), expected)


def test_scales_that_are_powers_of_two_are_left_alone(caplog):
    model = tiny.llama()
    recipe = [QuantizationModifier(scheme="MXFP4A16", ignore=["lm_head"]), DistillationModifier()]
    session = tiny.compress(model, recipe, DATA)
    assert not session.state.distillation
    assert "nothing to tune" in caplog.text


def test_the_model_and_its_gradients_are_as_they_were_until_the_end():
    model = tiny.llama()
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    before = tiny.snapshot(model)
    session = Session(model, [*awq(bits=3), DistillationModifier()])
    session.check()
    session.initialize(DATA)
    session.run()
    tiny.assert_unchanged(model, before)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("data", "message"), [(None, "needs calibration data"), (1, "at least two")])
def test_what_it_cannot_do_without_is_asked_for_before_computing(data, message):
    session = Session(tiny.llama(), [*rtn(), DistillationModifier()])
    session.check()
    with pytest.raises(BitpressError, match=message):
        session.initialize(None if data is None else tiny.token_data(1))


def test_two_of_them_are_refused():
    session = Session(tiny.llama(), [*rtn(), DistillationModifier(), DistillationModifier()])
    session.check()
    with pytest.raises(BitpressError, match="two DistillationModifiers"):
        session.initialize(DATA)


@pytest.mark.parametrize(("bits", "epochs"), [(8, 1), (4, 1), (3, 2), (2, 3)])
def test_coarser_grids_are_tuned_longer(bits, epochs):
    session = tiny.compress(tiny.llama(), [*rtn(bits=bits), DistillationModifier()], DATA)
    assert session.state.tuning.epochs == epochs


@pytest.mark.parametrize(("bits", "learned", "epochs"), [(4, False, 1), (2, False, 3), (4, True, 0), (3, True, 1)])
def test_how_many_epochs_auto_is(bits, learned, epochs):
    rounding = [LearnedRoundingModifier(iterations=1)] if learned else []
    session = Session(tiny.llama(), [*rtn(bits=bits), *rounding, DistillationModifier()])
    session.check()
    session.initialize(DATA)
    found = 0 if session.state.tuning is None else session.state.tuning.epochs
    assert found == epochs
