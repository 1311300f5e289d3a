"""Files of multiple-choice questions."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from bitpress.errors import BitpressError
from bitpress.pipelines.data.loading import load_named

# What published sets call the parts of a question; the first that is there counts.
CONTEXTS = ("context", "question", "query", "ctx", "prompt")
CHOICES = ("choices", "endings", "options")
ANSWERS = ("answer", "answerKey", "label", "gold")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        context: what comes before the choices.
        choices: at least two texts.
        answer: the place of the right one, from 0 on.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


def read_questions(given: Any, count: int | None = None) -> list[Question]:
    """Read questions.

    Args:
        given: a .jsonl, .json, .csv or .parquet file, a hub name, or an iterable of mappings. Of each the context
            (``context``, ``question``, ``query``, ``ctx`` or ``prompt``), the choices (``choices``, ``endings`` or
            ``options``: a list of texts, or ``{"text": [...], "label": [...]}``), and the answer (``answer``,
            ``answerKey``, ``label`` or ``gold``): its place from 0 on, its letter, its label, or its text.
        count: the first so many.

    Raises:
        BitpressError: names the file and the line.
    """
    if isinstance(given, (str, os.PathLike)):
        where, rows, lines = str(given), load_named(given, None, whole=True), _lines(given)
    elif isinstance(given, Iterable) and not isinstance(given, Mapping):
        where, rows, lines = "choices", given, None
    else:
        raise BitpressError(f"choices={type(given).__name__}: give a .jsonl file, or a list of questions.")
    found: list[Question] = []
    for index, row in enumerate(rows):
        if len(found) == count:
            break
        at = f"{where}, question {index + 1}" if lines is None else f"{where}, line {lines[index]}"
        found.append(row if isinstance(row, Question) else _question(row, at))
    if not found:
        raise BitpressError(f"{where} holds no questions.")
    return found


def _lines(file: str | os.PathLike[str]) -> list[int] | None:
    """The line of each row of a .jsonl file."""
    path = Path(file).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8").split("\n")
    return [number for number, line in enumerate(text, start=1) if line.strip()]


def _question(row: Any, at: str) -> Question:
    if not isinstance(row, Mapping):
        raise BitpressError(f'{at}: a question is an object with "question", "choices" and "answer".')
    context, stated, answer = (_part(row, names, at) for names in (CONTEXTS, CHOICES, ANSWERS))
    texts, labels = (stated.get("text"), stated.get("label")) if isinstance(stated, Mapping) else (stated, None)
    choices = list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else []
    if not isinstance(context, str):
        raise BitpressError(f"{at}: the question is no text, but {context!r}.")
    if len(choices) < 2 or not all(isinstance(each, str) and each.strip() for each in choices):
        raise BitpressError(f"{at}: choices are at least two texts, not {stated!r}.")
    return Question(context, tuple(choices), _answer(answer, choices, [str(label) for label in labels or ()], at))


def _part(row: Mapping[str, Any], names: Sequence[str], at: str) -> Any:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise BitpressError(f"{at} has no {' or '.join(map(repr, names))}; it has {', '.join(row) or 'nothing'}.")
    return row[found]


def _answer(answer: Any, choices: Sequence[str], labels: Sequence[str], at: str) -> int:
    """The place of the answer: exactly one, whichever way it is stated."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        places = {answer}
    elif isinstance(answer, str) and labels:
        places = {place for place, label in enumerate(labels) if label == answer}
    elif isinstance(answer, str):
        places = {place for place, choice in enumerate(choices) if choice == answer}
        if len(answer) == 1 and answer in ascii_uppercase:
            places.add(ascii_uppercase.index(answer))
        elif answer.isdecimal() and not places:
            places.add(int(answer))
    else:
        places = set()
    if len(places) != 1 or not places <= set(range(len(choices))):
        raise BitpressError(
            f"{at}: the answer {answer!r} is not one of {len(choices)} choices: give its place from 0 on, its letter, "
            "or its text."
        )
    return places.pop()
