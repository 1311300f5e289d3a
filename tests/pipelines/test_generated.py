"""Calibration text that the model writes itself."""

import compressing
import pytest
import tiny
import torch
from compressing import awq
from transformers import AutoModelForCausalLM

from bitpress import BitpressError, oneshot
from bitpress.modifiers import GeneratedTextModifier
from bitpress.modifiers.state import Writing
from bitpress.pipelines.data import prepare, with_generated
from bitpress.pipelines.data.generated import _Draws, write


def sure(scale=60.0):
    """A model whose predictions leave no doubt."""
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def test_each_text_goes_on_as_the_model_predicts():
    model = sure()
    ids = write(model, Writing(8, 24), None, seed=1)
    assert ids.shape == (8, 24)
    assert ids.dtype == torch.int64
    with torch.no_grad():
        likeliest = model(ids).logits[:, :-1].argmax(-1)
    assert float((likeliest == ids[:, 1:]).float().mean()) > 0.9
    # Random first tokens: hardly one twice.
    assert len(set(ids[:, 0].tolist())) >= 6


def test_words_come_as_often_as_they_are_predicted():
    scores = torch.tensor([0.0, 2.0, 9.0, -1.0, 1.0, -torch.inf])
    draws = _Draws([2], torch.Generator().manual_seed(0))
    picked = draws(torch.empty(0), scores.repeat(40000, 1)).argmax(-1)
    scores[2] = -torch.inf
    shares = picked.bincount(minlength=6) / 40000
    assert torch.allclose(shares, scores.softmax(0), atol=0.01)
    assert shares[2] == shares[5] == 0


def test_what_is_drawn_is_that_of_the_seed_and_of_nothing_else():
    model = tiny.llama().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = write(model, Writing(4, 16), None, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(write(model, Writing(4, 16), None, seed=1), first)
    assert not torch.equal(write(model, Writing(4, 16), None, seed=2), first)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("stated", "ends"), [(3, {3}), ([3, 5], {3, 5})])
def test_no_text_ends_early(stated, ends):
    model = tiny.llama()
    model.generation_config.eos_token_id = stated
    ids = write(model, Writing(64, 24), None, seed=1)
    assert ids.shape == (64, 24)
    assert not set(ids[:, 1:].flatten().tolist()) & ends


def test_it_begins_as_the_tokenizer_begins_and_has_no_special_tokens_inside():
    from tokenizers.processors import TemplateProcessing

    tokenizer = compressing.tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    model = tiny.llama()
    ids = write(model, Writing(16, 24), tokenizer, seed=0)
    assert ids.shape == (16, 24)
    assert bool((ids[:, 0] == bos).all())
    assert not set(ids[:, 1:].flatten().tolist()) & set(tokenizer.all_special_ids)
    plain = write(model, Writing(16, 24), compressing.tokenizer(), seed=0)
    assert not set(plain.flatten().tolist()) & set(tokenizer.all_special_ids)


def test_it_stands_evenly_among_the_data_in_batches_of_the_same_size():
    model = tiny.llama()
    given = prepare(compressing.token_ids(count=8, length=32), num_calibration_samples=8, model=model)
    data = with_generated(given, model, Writing(8, 16), None, seed=0)
    shapes = [tuple(batch.kwargs["input_ids"].shape) for batch in data.batches]
    assert shapes.count((1, 32)) == 8
    assert shapes.count((2, 16)) == 4
    assert (2, 16) in shapes[:3]
    assert (2, 16) in shapes[-3:]
    assert data.samples == 16
    assert data.tokens == 8 * 32 + 8 * 16
    own = [b.kwargs["input_ids"] for b in data.batches if b.kwargs["input_ids"].shape == (1, 32)]
    assert all(torch.equal(a, b.kwargs["input_ids"]) for a, b in zip(own, given.batches, strict=True))


def test_a_model_needs_no_dataset_then(caplog):
    model = tiny.llama()
    before = tiny.snapshot(model)
    oneshot(model, recipe=[GeneratedTextModifier(samples=4, length=32), *awq(bits=3)], progress=False)
    report = model.bitpress.report
    assert report["samples"] == 4
    assert "4 sequences of 32 tokens, which is all there is" in caplog.text
    assert report["mappings"]
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])


def test_a_path_is_loaded_as_a_whole(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "source")
    recipe = [GeneratedTextModifier(samples=4, length=32), *awq(bits=3)]
    oneshot(tmp_path / "source", recipe=recipe, output_dir=tmp_path / "out", progress=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(BitpressError, match="GeneratedTextModifier needs all of the model at once"):
        oneshot(tmp_path / "source", recipe=recipe, output_dir=tmp_path / "other", stream=True, progress=False)


def test_models_that_write_no_text_do_with_the_dataset_and_need_one(caplog):
    plain, other = tiny.bert(), tiny.bert()
    oneshot(plain, compressing.token_ids(), awq(bits=3), progress=False)
    oneshot(other, compressing.token_ids(), [GeneratedTextModifier(), *awq(bits=3)], progress=False)
    assert "with BertForMaskedLM no text is written" in caplog.text
    tiny.assert_unchanged(other, tiny.snapshot(plain))
    with pytest.raises(BitpressError, match="BertForMaskedLM writes no text to calibrate on: give oneshot a dataset"):
        oneshot(tiny.bert(), recipe=[GeneratedTextModifier(), *awq()], progress=False)


def test_none_is_as_if_it_were_not_there(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "source")
    recipe = [GeneratedTextModifier(samples=0), *awq(bits=3)]
    ids = compressing.token_ids()
    for name, steps in {"without": recipe[1:], "none": recipe}.items():
        oneshot(tmp_path / "source", ids, steps, output_dir=tmp_path / name, stream=True, progress=False)
    files = [tmp_path / name / "model.safetensors" for name in ("without", "none")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(BitpressError, match="no dataset was given"):
        oneshot(tiny.llama(), recipe=recipe, progress=False)
