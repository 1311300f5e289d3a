"""Multiple choice: the answer that a model holds most likely, scored as lm-evaluation-harness does."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.evaluation.questions import Question
from bitpress.evaluation.scores import negative_log_likelihood
from bitpress.evaluation.subjects import Subject
from bitpress.evaluation.text import positions


@dataclass(frozen=True)
class Accuracy:
    """Of answers to multiple-choice questions.

    Attributes:
        questions: how many.
        accuracy: the share whose right choice has the largest ``log p(choice | context)``, summed over its tokens.
        standard_error: of it.
        accuracy_norm: the same with that sum divided by the choice's length in characters.
        norm_standard_error: of it.
        original_accuracy: of the original; None without one, as those below.
        original_accuracy_norm: of the original.
        same_answers: the share of questions to which both give the same answer, right or wrong.
        log_likelihoods: of each choice of each question, in nats.
    """

    questions: int
    accuracy: float
    standard_error: float
    accuracy_norm: float
    norm_standard_error: float
    original_accuracy: float | None = None
    original_accuracy_norm: float | None = None
    same_answers: float | None = None
    log_likelihoods: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class _Request:
    """A context with one of its choices: (tokens,) ids, of which those from ``start`` on are the choice's."""

    question: int
    choice: int
    ids: Tensor
    start: int


def answer(
    subject: Subject,
    original: Subject | None,
    questions: Sequence[Question],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Accuracy:
    """Let a model, and the original, answer questions.

    Args:
        subject: the model; its tokenizer is used for both.
        original: what it is compared with.
        questions: at least one.
        batch_size: choices that run together.
        on_batch: called after each batch with the number of its choices.

    Raises:
        BitpressError: a choice is longer than what the model can read.
    """
    requests = list(_requests(subject, questions))
    ours = _log_likelihoods(subject, questions, requests, batch_size, on_batch)
    right, right_norm, chosen = _marks(questions, ours)
    found: dict[str, Any] = {}
    if original is not None:
        theirs = _log_likelihoods(original, questions, requests, batch_size, on_batch)
        original_right, original_norm, original_chosen = _marks(questions, theirs)
        found = {
            "original_accuracy": _mean(original_right),
            "original_accuracy_norm": _mean(original_norm),
            "same_answers": _mean(a == b for a, b in zip(chosen, original_chosen, strict=True)),
        }
    return Accuracy(
        len(questions),
        _mean(right),
        _error(right),
        _mean(right_norm),
        _error(right_norm),
        log_likelihoods=tuple(tuple(each) for each in ours),
        **found,
    )


def encode_pair(tokenizer: Any, context: str, choice: str) -> tuple[list[int], int]:
    """Token ids of a context with a choice, and how many of them are the context's.

    Both are encoded together, as a model would meet them, and cut where the context's own encoding ends, or departs
    from it: a token that spans the two is the choice's. Blanks at the end of the context go to the choice; where
    there is none between the two, one is put there.
    """
    stripped = context.rstrip()
    between = context[len(stripped) :] or ("" if not context or choice[:1].isspace() else " ")
    texts = (stripped, stripped + between + choice)
    alone, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    start = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
    first = _first_token(tokenizer)
    added = tokenizer(texts[1])["input_ids"][:1] == [first] and whole[:1] != [first]
    if first is not None and (added or start == 0):
        return [first, *whole], start + 1
    return list(whole), start


def _first_token(tokenizer: Any) -> int | None:
    tokens = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((int(token) for token in tokens if token is not None), None)


def _requests(subject: Subject, questions: Sequence[Question]) -> Iterable[_Request]:
    limit = positions(subject.model)
    for index, question in enumerate(questions):
        for place, choice in enumerate(question.choices):
            ids, start = encode_pair(subject.tokenizer, question.context, choice)
            if start == 0 or start == len(ids):
                raise BitpressError(
                    f"question {index + 1}: nothing comes before, or is left of, the choice {choice!r}: give the "
                    "question a context."
                )
            # As lm-evaluation-harness does: the beginning of a context that is too long is left out.
            # The last token is only predicted, never read.
            over = max(0, len(ids) - 1 - limit) if limit is not None else 0
            if over >= start:
                raise BitpressError(
                    f"question {index + 1}: the choice {choice[:40]!r} has {len(ids) - start} tokens, and "
                    f"{subject.name} reads {limit}."
                )
            yield _Request(index, place, torch.tensor(ids[over:]), start - over)


def _log_likelihoods(
    subject: Subject,
    questions: Sequence[Question],
    requests: Sequence[_Request],
    batch_size: int,
    on_batch: Callable[[int], None],
) -> list[list[float]]:
    found = [[0.0] * len(question.choices) for question in questions]
    # Of one length where possible, so that little is padded; the longest first: too little memory shows at once.
    order = sorted(requests, key=lambda request: -len(request.ids))
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence([request.ids[:-1] for request in group], batch_first=True)
        lengths = torch.tensor([len(request.ids) - 1 for request in group])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = subject.logits(ids, None if bool(mask.all()) else mask)
        for row, request in enumerate(group):
            targets = request.ids[request.start :].to(logits.device)
            predictions = logits[row, request.start - 1 : len(request.ids) - 1]
            nll = negative_log_likelihood(predictions, targets)
            found[request.question][request.choice] = -float(nll.double().sum())
        on_batch(len(group))
    return found


def _marks(
    questions: Sequence[Question], log_likelihoods: Sequence[Sequence[float]]
) -> tuple[list[bool], list[bool], list[int]]:
    """Which are right, which are right with lengths divided out, and what was chosen."""
    chosen, normalized = [], []
    for question, sums in zip(questions, log_likelihoods, strict=True):
        chosen.append(_largest(sums))
        normalized.append(_largest([s / len(choice) for s, choice in zip(sums, question.choices, strict=True)]))
    answers = [question.answer for question in questions]
    return (
        [a == b for a, b in zip(chosen, answers, strict=True)],
        [a == b for a, b in zip(normalized, answers, strict=True)],
        chosen,
    )


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: values[place])


def _mean(marks: Iterable[bool]) -> float:
    listed = list(marks)
    return sum(listed) / len(listed)


def _error(marks: Sequence[bool]) -> float:
    """The sample's standard deviation over the root of its size."""
    share = _mean(marks)
    return math.sqrt(share * (1 - share) / (len(marks) - 1)) if len(marks) > 1 else 0.0
