"""evaluate: how good a model is, and how like the original, in one call."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpress.errors import BitpressError
from bitpress.evaluation import Evaluation
from bitpress.evaluation.agreement import agreement
from bitpress.evaluation.choices import Accuracy, answer, encode_pair
from bitpress.evaluation.continuations import check_prompts, continue_prompts
from bitpress.evaluation.harness import check_installed, run_tasks
from bitpress.evaluation.outputs import compare_outputs, read_batches
from bitpress.evaluation.perplexity import perplexity
from bitpress.evaluation.progress import progress as progress_of
from bitpress.evaluation.questions import Question, read_questions
from bitpress.evaluation.subjects import Subject, check_same_tokens, evaluating, open_subject
from bitpress.evaluation.text import Reading, Text, open_data, read_text
from bitpress.evaluation.tokens import score_tokens, worst_tokens
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.pipelines.data.sources import ReadyBatches, SampleRows
from bitpress.report.adding import add_evaluation, find_report


def evaluate(  # noqa: PLR0913
    model: nn.Module | str | os.PathLike[str],
    dataset: Any = None,
    *,
    original: nn.Module | str | os.PathLike[str] | None = None,
    choices: Any = None,
    tasks: Sequence[str | dict[str, Any]] | None = None,
    prompts: Sequence[str] | None = None,
    report: bool = False,
    tokenizer: Any = None,
    max_seq_length: int | None = None,
    stride: int | None = None,
    num_samples: int | None = None,
    batch_size: int = 1,
    text_column: str = "text",
    splits: Any = None,
    concatenate_data: bool | None = None,
    bos: bool = False,
    worst: int = 10,
    device: torch.device | str | None = None,
    trust_remote_code_model: bool = False,
    progress: bool | None = None,
) -> Evaluation:
    """Evaluate a model: on a text, on questions, on lm-eval's tasks; with an original, beside it.

    Both models are in memory together, and every batch is run once through each. They are left as they were.

    Args:
        model: a module, or the path or hub id of a model; of a compressed checkpoint, its dense weights.
        dataset: texts or token ids, for perplexity and agreement: a .txt, .jsonl, .parquet or .csv path, a hub name,
            strings, lists of token ids, a ``datasets`` dataset. With an original, of any other module: batches of what
            its forward takes, as :func:`bitpress.oneshot` has them.
        original: what the model is compared with: a module, a path or a hub id, with the same tokenizer.
        choices: multiple-choice questions: a .jsonl file, a hub name or a list, each with ``question``, ``choices`` and
            ``answer`` (its place from 0 on, its letter, or its text).
        tasks: of lm-eval: names, YAML files or configurations. Needs ``pip install bitpress[eval]``.
        prompts: texts that the model, and the original, go on from by 48 tokens, always the likeliest.
        report: add what is found to the report.json, report.html and model card of ``model``, a directory.
        tokenizer: for text, or its path; by default the one beside the model, or beside the original.
        max_seq_length: tokens of a window at most; by default what the model can read, up to 2048.
        stride: tokens from the start of a window to the next one's; by default a window's length, so that windows are
            disjoint and the first token of each is not scored. A smaller one scores every token but the first, once,
            with at least ``max_seq_length - stride`` tokens before it.
        num_samples: the first so many windows, rows of batches, questions, and documents of each task; by default all.
        batch_size: windows, or choices, that run together.
        text_column: of the dataset.
        splits: of the dataset, as ``datasets.load_dataset`` names them.
        concatenate_data: join sequences, with the end-of-sequence token between them, before they are cut. By default
            texts are joined, and sequences of token ids are not.
        bos: begin every window with the beginning-of-sequence token, which is not scored. By default it stands where
            the tokenizer puts it: at most at the start of a text.
        worst: how many of the tokens with the largest divergence are shown.
        device: where models that are given by their names are computed; by default a CUDA device if there is one.
        trust_remote_code_model: let transformers run code that comes with a checkpoint.
        progress: show it in the terminal; by default if there is one.

    Raises:
        BitpressError: what is wrong, where, and the way out; mostly before anything is computed.
    """
    if all(not each for each in (dataset is not None, choices is not None, tasks, prompts)):
        raise BitpressError("evaluate needs something to evaluate on: dataset=, choices= or tasks=, or prompts=.")
    beside = find_report(model) if report else None
    reading = Reading(max_seq_length, stride, num_samples, batch_size, text_column, splits, concatenate_data, bos)
    if tasks:
        check_installed()
    questions = None if choices is None else read_questions(choices, num_samples)
    if device is not None and isinstance(model, nn.Module) and (original is None or isinstance(original, nn.Module)):
        raise BitpressError("device= is for models that are given by their paths: move the modules themselves there.")
    opening: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code_model}
    subject, other = _open(model, original, tokenizer, opening)
    found: dict[str, Any] = {"model": subject.name, "original": None if other is None else other.name}
    with evaluating(subject, other):
        if questions is not None:
            _check_questions(subject, questions)
        check_prompts(subject, prompts or ())
        if dataset is not None:
            found |= _on_data(dataset, subject, other, reading, worst, progress)
        if questions is not None:
            found["choices"] = _on_questions(subject, other, questions, batch_size, progress)
        if prompts:
            found["continuations"] = continue_prompts(subject, other, prompts)
        if tasks:
            options: dict[str, Any] = {"batch_size": batch_size, "num_samples": num_samples}
            found["tasks"] = run_tasks(subject, tasks, **options)
            found["original_tasks"] = None if other is None else run_tasks(other, tasks, **options)
    evaluation = Evaluation(**found)
    _add(evaluation, beside)
    return evaluation


def _add(evaluation: Evaluation, report: Path | None) -> None:
    if report is not None:
        add_evaluation(report, evaluation.to_dict())


def _open(model: Any, original: Any, tokenizer: Any, opening: dict[str, Any]) -> tuple[Subject, Subject | None]:
    """Both, with a tokenizer if either has one."""
    subject = open_subject(model, tokenizer, **opening)
    if original is None:
        return subject, None
    other = open_subject(original, None, **opening)
    check_same_tokens(subject, other)
    shared = other.tokenizer if subject.tokenizer is None else subject.tokenizer
    return Subject(subject.name, subject.model, shared), Subject(other.name, other.model, other.tokenizer or shared)


def _on_data(
    dataset: Any, subject: Subject, other: Subject | None, reading: Reading, worst: int, show: bool | None
) -> dict[str, Any]:
    source = open_data(dataset, subject, reading)
    if isinstance(source, SampleRows | ReadyBatches):
        if other is None:
            raise BitpressError(
                f"{source.where} holds neither texts nor token ids: what a module makes of it can only be compared "
                "with an original's: pass original=."
            )
        data = read_batches(source, subject, reading)
        return _compare(subject, other, data, show)
    text = read_text(source, subject, reading)
    if not subject.predicts(text.windows[0].ids):
        if other is None:
            raise subject.refuse()
        return _compare(subject, other, _as_batches(text), show)
    with progress_of("windows", len(text.windows), show=show) as on_batch:
        scores = score_tokens(subject, other, text, reading.batch_size, on_batch)
    shown = worst_tokens(scores, text, subject.tokenizer, worst)
    return {
        "tokens": scores,
        "perplexity": perplexity(scores, text, subject.tokenizer),
        "agreement": agreement(scores, shown),
    }


def _compare(subject: Subject, other: Subject, data: CalibrationData, show: bool | None) -> dict[str, Any]:
    with progress_of("batches", len(data.batches), show=show) as on_batch:
        return {"outputs": compare_outputs(subject, other, data, on_batch)}


def _as_batches(text: Text) -> CalibrationData:
    rows = [Batch((), {"input_ids": window.ids[None]}) for window in text.windows]
    return CalibrationData(rows, len(rows), sum(len(window.ids) for window in text.windows), sliceable=False)


def _check_questions(subject: Subject, questions: Sequence[Question]) -> None:
    if subject.tokenizer is None:
        raise BitpressError("questions need a tokenizer: pass tokenizer=.")
    first = questions[0]
    ids, _ = encode_pair(subject.tokenizer, first.context, first.choices[0])
    if len(ids) > 1 and not subject.predicts(torch.tensor(ids)):
        raise subject.refuse()


def _on_questions(
    subject: Subject, other: Subject | None, questions: Sequence[Question], batch_size: int, show: bool | None
) -> Accuracy:
    total = sum(len(question.choices) for question in questions) * (1 if other is None else 2)
    with progress_of("choices", total, show=show) as on_batch:
        return answer(subject, other, questions, batch_size, on_batch)
