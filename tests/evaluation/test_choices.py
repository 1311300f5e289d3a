"""Questions: how they are read, and how choices are scored."""

import json
import math

import pytest
import tiny
import torch
from compressing import WORDS, rtn, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bitpress import BitpressError, evaluate, oneshot
from bitpress.evaluation.choices import encode_pair
from bitpress.evaluation.questions import Question, read_questions

QUESTIONS = [
    {
        "question": " ".join(WORDS[i : i + 1 + i % 7]),
        "choices": [WORDS[i + 20], f"{WORDS[i]} w{i}", "w1 w2 w3"],
        "answer": i % 3,
    }
    for i in range(12)
]


@torch.no_grad()
def log_likelihoods(model, question):
    """A choice at a time, a token at a time."""
    words = tokenizer()
    context = words(question["question"]).input_ids
    sums = []
    for choice in question["choices"]:
        ids, total = list(context), 0.0
        for token in words(choice).input_ids:
            total += model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        sums.append(total)
    return sums


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_a_plain_loop(batch_size):
    model = tiny.llama()
    found = evaluate(model, choices=QUESTIONS, tokenizer=tokenizer(), batch_size=batch_size).choices
    expected = [log_likelihoods(model, question) for question in QUESTIONS]
    torch.testing.assert_close(torch.tensor(found.log_likelihoods), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    right = [sums.index(max(sums)) == q["answer"] for sums, q in zip(expected, QUESTIONS, strict=True)]
    by_length = [
        [s / len(c) for s, c in zip(sums, q["choices"], strict=True)]
        for sums, q in zip(expected, QUESTIONS, strict=True)
    ]
    norm = [sums.index(max(sums)) == q["answer"] for sums, q in zip(by_length, QUESTIONS, strict=True)]
    assert right != norm
    assert (found.questions, found.accuracy, found.accuracy_norm) == (12, sum(right) / 12, sum(norm) / 12)
    assert found.standard_error == pytest.approx(torch.tensor(right).double().std().item() / math.sqrt(12))
    assert found.same_answers is None


def test_beside_the_original():
    model, original = oneshot(tiny.llama(), recipe=rtn(bits=2)), tiny.llama()
    words = [{"question": a, "choices": WORDS[i : i + 20], "answer": i % 7} for i, a in enumerate(WORDS[:30])]
    found, alone = (
        evaluate(each, choices=words, tokenizer=tokenizer(), batch_size=20, **beside).choices
        for each, beside in ((model, {"original": original}), (original, {}))
    )
    assert found.original_accuracy == alone.accuracy
    assert found.original_accuracy_norm == alone.accuracy_norm
    chosen = [[max(range(20), key=each.__getitem__) for each in it.log_likelihoods] for it in (found, alone)]
    assert found.same_answers == sum(a == b for a, b in zip(*chosen, strict=True)) / 30 < 1


def test_the_beginning_of_a_context_that_is_too_long_is_left_out():
    model = tiny.llama(max_position_embeddings=8)
    long = {**QUESTIONS[0], "question": " ".join(WORDS[:40])}
    # Seven words and the choice's first can be read; its last is only predicted.
    short = {**long, "question": " ".join(WORDS[34:40])}
    found, same = (evaluate(model, choices=[q], tokenizer=tokenizer()).choices for q in (long, short))
    assert found.log_likelihoods[0][2] == pytest.approx(same.log_likelihoods[0][2], rel=1e-5)
    with pytest.raises(BitpressError, match=r"question 1: the choice .* has 9 tokens, and LlamaForCausalLM reads 8"):
        evaluate(model, choices=[{**long, "choices": ["w1", " ".join(WORDS[:9])]}], tokenizer=tokenizer())


def characters():
    """Tokens are characters, but "ab" is one; blanks are tokens of their own."""
    vocabulary = {c: i for i, c in enumerate("abcd ")} | {"<s>": 5, "ab": 6}
    plain = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=plain, **{"bos_token": "<s>"})


@given(context=st.text("abcd ", max_size=6), choice=st.text("abcd", min_size=1, max_size=4))
def test_pairs_are_encoded_as_one_text(context, choice):
    characters_ = characters()
    ids, start = encode_pair(characters_, context, choice)
    between = "" if not context or context[-1:] == " " else " "
    whole = characters_(context + between + choice, add_special_tokens=False).input_ids
    assert [i for i in ids if i != 5] == whole
    # Where nothing comes before, the beginning of the sequence does.
    assert 0 < start < len(ids)
    assert "".join(characters_.convert_ids_to_tokens(ids[start:])).strip() == choice
    assert (ids[0] == 5) == (not context.strip())


def test_a_token_that_spans_both_is_the_choice_s():
    ids, start = encode_pair(_Spanning(), "a", "b")
    assert (ids, start) == ([5, 6], 1)


class _Spanning:
    """Joins "a", the blank, and "b"."""

    bos_token_id = 5

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": {"a": [0], "a b": [6]}[text]}


PUBLISHED = {
    "place": {"question": "q", "choices": ["x", "y"], "answer": 1},
    "letter": {"question": "q", "choices": ["x", "y"], "answer": "B"},
    "text": {"context": "q", "choices": ["x", "y"], "answer": "y"},
    "hellaswag": {"ctx": "q", "endings": ["x", "y"], "label": "1", "ctx_a": "other"},
    "arc": {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
    "arc with letters": {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets_are_read_as_they_are(name):
    assert read_questions([PUBLISHED[name]]) == [Question("q", ("x", "y"), 1)]


WRONG = {
    "no answer": ({"question": "q", "choices": ["x", "y"]}, "has no 'answer' or .*; it has question, choices"),
    "beyond": ({"question": "q", "choices": ["x", "y"], "answer": 2}, "the answer 2 is not one of 2 choices"),
    "negative": ({"question": "q", "choices": ["x", "y"], "answer": -1}, "the answer -1"),
    "letter": ({"question": "q", "choices": ["x", "y"], "answer": "C"}, "the answer 'C'"),
    "ambiguous": ({"question": "q", "choices": ["B", "A"], "answer": "A"}, "the answer 'A'"),
    "twice": ({"question": "q", "choices": ["x", "x"], "answer": "x"}, "the answer 'x'"),
    "bool": ({"question": "q", "choices": ["x", "y"], "answer": True}, "the answer True"),
    "one choice": ({"question": "q", "choices": ["x"], "answer": 0}, "at least two texts"),
    "a text": ({"question": "q", "choices": "xy", "answer": 0}, "at least two texts"),
    "no text": ({"question": 3, "choices": ["x", "y"], "answer": 0}, "the question is no text, but 3"),
    "a list": ([1, 2], "a question is an object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_file_and_the_line(case, tmp_path):
    row, message = WRONG[case]
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{json.dumps(PUBLISHED['place'])}\n\n{json.dumps(row)}\n")
    with pytest.raises(BitpressError, match=rf"questions\.jsonl, line 3.*{message}"):
        read_questions(file)
    assert len(read_questions(file, 1)) == 1


def test_other_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for asked, message in (
        (tmp_path / "empty.jsonl", "no questions"),
        (tmp_path / "no.jsonl", "does not exist"),
        (3, "list"),
    ):
        with pytest.raises(BitpressError, match=message):
            read_questions(asked)
    with pytest.raises(BitpressError, match="BertForMaskedLM is no causal"):
        evaluate(tiny.bert(), choices=QUESTIONS, tokenizer=tokenizer())
