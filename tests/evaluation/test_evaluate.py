"""evaluate: perplexity and agreement of models in memory and on the disk."""

import json
import math

import pytest
import tiny
import torch
from compressing import rtn, sentences, tokenizer
from safetensors.torch import load_file

from bitpress import BitpressError, evaluate, oneshot

TEXTS = sentences()


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def compressed():
    return oneshot(tiny.llama(), recipe=rtn(bits=3))


@pytest.fixture(scope="module")
def folders(compressed, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    compressed.save_pretrained(folder / "compressed")
    model.save_pretrained(folder / "original")
    for name in ("compressed", "original"):
        tokenizer().save_pretrained(folder / name)
    return folder


def windows(length, count, seed=0):
    return torch.randint(3, tiny.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_perplexity_is_that_of_the_loss_of_transformers(model):
    ids = windows(24, 5)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    found = evaluate(model, ids, batch_size=2).perplexity
    assert found.nll == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found.perplexity == math.exp(found.nll)
    assert (found.tokens, found.windows) == (5 * 23, 5)
    assert found.bits_per_byte is None


@torch.no_grad()
def test_a_text_is_joined_and_cut(model):
    words = tokenizer()
    # Each text once, with the end of a sequence between them.
    whole = words((" <eos> ".join(TEXTS)), return_tensors="pt").input_ids[0]
    found = evaluate(model, TEXTS, tokenizer=words, max_seq_length=32)
    losses = []
    for start in range(0, len(whole), 32):
        row = whole[start : start + 32][None]
        if row.shape[1] > 1:
            losses.append(model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1))
    assert found.perplexity.nll * found.perplexity.tokens == pytest.approx(sum(losses), rel=1e-5)
    spelled = sum(len(words.decode(part[1:], skip_special_tokens=True).encode()) for part in whole.split(32))
    bits = found.perplexity.nll * found.perplexity.tokens / math.log(2)
    assert found.perplexity.bits_per_byte == pytest.approx(bits / spelled, rel=0.05)


@torch.no_grad()
def test_strided_windows_are_those_of_a_plain_loop(model):
    ids = windows(50, 1)[0]
    found = evaluate(model, [ids.tolist()], max_seq_length=16, stride=5)
    total = 0.0
    for token in range(1, 50):
        start = next(s for s in range(0, 50, 5) if token < s + 16)
        logits = model(input_ids=ids[None, start : start + 16]).logits[0, token - start - 1]
        total -= logits.log_softmax(-1)[ids[token]].item()
    assert found.perplexity.tokens == 49
    assert found.perplexity.nll == pytest.approx(total / 49, rel=1e-5)
    assert torch.equal(found.tokens.position, torch.arange(1, 50))


@torch.no_grad()
def test_windows_that_begin_with_the_beginning(model):
    ids = windows(20, 1)[0]
    found = evaluate(model, [ids.tolist()], tokenizer=tokenizer(), max_seq_length=11, bos=True)
    rows = torch.cat([torch.ones(2, 1, dtype=torch.int64), ids.view(2, 10)], 1)
    assert found.perplexity.nll == pytest.approx(model(input_ids=rows, labels=rows).loss.item(), rel=1e-6)
    assert found.perplexity.tokens == 20


def test_a_model_agrees_with_itself(model):
    found = evaluate(model, windows(24, 3), original=tiny.llama())
    same = found.agreement
    assert (same.divergence, same.maximum, same.standard_error) == (0, 0, 0)
    assert (same.top1, same.perplexity_ratio, same.ratio_standard_error) == (1, 1, 0)
    assert same.original_perplexity == found.perplexity.perplexity


@torch.no_grad()
def test_agreement_is_that_of_a_plain_reference(model, compressed):
    ids = windows(24, 4)
    found = evaluate(compressed, ids, original=model, batch_size=3, worst=2)
    p, q = (each(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for each in (model, compressed))
    divergence = (p.exp() * (p - q)).sum(-1).flatten()
    agreement = found.agreement
    torch.testing.assert_close(found.tokens.divergence.double(), divergence, rtol=1e-3, atol=1e-6)
    assert agreement.divergence == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert agreement.standard_error == pytest.approx(divergence.std().item() / math.sqrt(92), rel=1e-4)
    assert agreement.median == pytest.approx(divergence.median().item(), rel=1e-3)
    assert agreement.maximum == pytest.approx(divergence.max().item(), rel=1e-3)
    assert agreement.median <= agreement.percentile_99 <= agreement.maximum
    assert agreement.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    targets = ids[:, 1:, None]
    lost = (p.gather(-1, targets) - q.gather(-1, targets)).flatten()
    assert agreement.perplexity_ratio == pytest.approx(lost.mean().exp().item(), rel=1e-5)
    assert agreement.ratio_standard_error == pytest.approx(
        agreement.perplexity_ratio * lost.std().item() / math.sqrt(92), rel=1e-4
    )
    row, place = divmod(int(divergence.argmax()), 23)
    worst = agreement.worst[0]
    assert (worst.sequence, worst.position) == (row, place + 1)
    assert worst.token == str(ids[row, place + 1].item())
    assert worst.context.split() == [str(i) for i in ids[row, max(0, place - 11) : place + 1].tolist()]
    assert worst.original_says == str(p[row, place].argmax().item())
    assert worst.model_says == str(q[row, place].argmax().item())
    assert len(agreement.worst) == 2


def test_a_checkpoint_is_evaluated_as_the_model_in_memory(folders, compressed, model):
    found = evaluate(folders / "compressed", TEXTS, original=folders / "original", max_seq_length=32)
    same = evaluate(compressed, TEXTS, original=model, tokenizer=tokenizer(), max_seq_length=32)
    assert torch.equal(found.tokens.nll, same.tokens.nll)
    assert torch.equal(found.tokens.divergence, same.tokens.divergence)
    assert found.perplexity == same.perplexity
    assert found.agreement == same.agreement
    assert found.agreement.divergence > 0


def test_the_batch_size_changes_nothing_but_rounding(model):
    one, many = (evaluate(model, windows(16, 7), batch_size=size).tokens.nll for size in (1, 4))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_the_first_windows(model):
    ids = windows(24, 6)
    few = evaluate(model, ids, num_samples=2)
    assert few.perplexity.windows == 2
    assert torch.equal(few.tokens.token, ids[:2, 1:].flatten())


def test_models_are_left_as_they_were():
    model = tiny.llama().train()
    model.model.layers[0].eval()
    model.config.use_cache = True
    before = tiny.snapshot(model)
    modes = [module.training for module in model.modules()]
    evaluate(model, windows(12, 2), original=model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is True
    tiny.assert_unchanged(model, before)
    model(input_ids=windows(12, 2), labels=windows(12, 2)).loss.backward()


def test_dropout_is_off():
    model = tiny.gpt2(resid_pdrop=0.5).train()
    ids = windows(12, 2)
    assert torch.equal(evaluate(model, ids).tokens.nll, evaluate(model, ids).tokens.nll)


def test_figures_of_tokens_are_written(model, compressed, tmp_path):
    found = evaluate(compressed, windows(12, 2), original=model).tokens
    found.save(tmp_path / "tokens.safetensors")
    found.save(tmp_path / "tokens.json")
    stored = load_file(tmp_path / "tokens.safetensors")
    assert stored.keys() == found.tensors().keys() == json.loads((tmp_path / "tokens.json").read_text()).keys()
    assert all(torch.equal(stored[name], value) for name, value in found.tensors().items())
    assert all(len(value) == len(found) == 22 for value in stored.values())
    with pytest.raises(BitpressError, match=r"\.safetensors or a \.json"):
        found.save(tmp_path / "tokens.pt")


def test_padding_of_the_vocabulary_is_left_out(model):
    padded = tiny.llama()
    padded.resize_token_embeddings(tiny.VOCABULARY + 8)
    with torch.no_grad():
        padded.lm_head.weight[tiny.VOCABULARY :] = 0
    found = evaluate(padded, TEXTS, original=model, tokenizer=tokenizer(), max_seq_length=32)
    assert found.agreement.maximum < 1e-6
    with pytest.raises(BitpressError, match="predicts 136 tokens, the original 128"):
        evaluate(padded, windows(12, 2), original=model)


def test_an_encoder_has_no_perplexity_but_agrees_with_its_original():
    bert, other = tiny.bert(), tiny.bert()
    with pytest.raises(BitpressError, match="BertForMaskedLM is no causal language model"):
        evaluate(bert, windows(12, 2))
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(1.1)
    found = evaluate(bert, windows(12, 2), original=other)
    assert found.perplexity is None
    assert 0 < found.outputs.relative_error < 0.5
    assert found.outputs.divergence > 0
    assert found.outputs.top1 <= 1


@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name != "bert"])
def test_decoders_predict_each_token_from_those_before(name):
    assert evaluate(tiny.FAMILIES[name](), windows(12, 1)).perplexity.tokens == 11


@torch.no_grad()
def test_any_module_beside_its_original():
    model, original = tiny.seeded(lambda: tiny.MLP(8, 16, 4)), tiny.seeded(lambda: tiny.MLP(8, 16, 4), 1)
    rows = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    found = evaluate(model, rows, original=original, batch_size=4).outputs
    a, b = model(rows).double(), original(rows).double()
    assert found.relative_error == pytest.approx((a - b).norm().item() / b.norm().item(), rel=1e-5)
    assert found.cosine == pytest.approx(torch.cosine_similarity(a.flatten(), b.flatten(), 0).item(), rel=1e-5)
    assert (found.values, found.samples, found.top1) == (40, 10, None)
    same = evaluate(model, list(rows.split(5)), original=model, num_samples=5).outputs
    assert (same.relative_error, same.cosine, same.values) == (0, 1, 20)


def test_the_report_is_for_people_and_for_json(model, compressed):
    found = evaluate(compressed, TEXTS, original=model, tokenizer=tokenizer(), max_seq_length=32, worst=3)
    lines = "\n".join(found.lines())
    assert f"{found.agreement.divergence:.6f}" in lines
    assert f"→ {json.dumps(found.agreement.worst[2].token)}" in lines
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["agreement"]["worst"][0]["divergence"] == found.agreement.maximum
    assert told["perplexity"]["perplexity"] == found.perplexity.perplexity
    assert "choices" not in told


def test_what_is_infinite_is_nothing_in_json(model):
    broken = tiny.llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    told = evaluate(broken, windows(12, 2), original=model).to_dict()
    assert told["perplexity"]["nll"] is None
    json.dumps(told, allow_nan=False)


class NotAModel(torch.nn.Module):
    def forward(self, x):
        return x


ERRORS = {
    "nothing": (lambda _: {}, "dataset=, choices= or tasks="),
    "no tokenizer": (lambda _: {"dataset": TEXTS}, "need a tokenizer"),
    "empty": (lambda _: {"dataset": [[]]}, "is empty"),
    "one token": (lambda _: {"dataset": [[5]]}, "nothing to score"),
    "stride": (lambda _: {"dataset": [[5] * 9], "max_seq_length": 4, "stride": 5}, "a stride of 4 at most"),
    "window": (lambda _: {"dataset": [[5] * 9], "max_seq_length": 1}, "at least two tokens"),
    "long": (lambda _: {"dataset": [[5] * 9], "max_seq_length": 4096}, "reads 128 tokens"),
    "batch size": (lambda _: {"dataset": [[5] * 9], "batch_size": 0}, "batch_size=0"),
    "vocabulary": (lambda _: {"dataset": [[5, 500]]}, "token id 500 is outside"),
    "bos": (lambda _: {"dataset": [[5] * 9], "bos": True}, "no tokenizer with a beginning"),
    "batches alone": (lambda _: {"dataset": torch.rand(3, 8)}, "original="),
    "no such original": (lambda _: {"dataset": [[5] * 9], "original": "/no/such"}, "cannot be loaded"),
    "questions without a tokenizer": (
        lambda _: {"choices": [{"question": "w1", "choices": ["w2", "w3"], "answer": 0}]},
        "questions need a tokenizer",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_way_out(case, model):
    make, message = ERRORS[case]
    with pytest.raises(BitpressError, match=message):
        evaluate(model, **make(model))


def test_outputs_of_other_shapes():
    with pytest.raises(BitpressError, match=r"\[\(1, 4\)\] and \[\(1, 8\)\]"):
        evaluate(tiny.MLP(8, 4), torch.rand(3, 8), original=NotAModel())


def test_tokenizers_that_differ(folders, tmp_path):
    other = json.loads((folders / "original" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["w5"], vocabulary["w9"] = vocabulary["w9"], vocabulary["w5"]
    tiny.llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(BitpressError, match=r"token 8 is 'w5' for the one, 'w9' for the other.*bits per byte"):
        evaluate(folders / "compressed", TEXTS, original=tmp_path)
