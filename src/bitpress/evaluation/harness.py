"""Tasks of lm-evaluation-harness (the package lm-eval), on a model that is loaded."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from bitpress.errors import BitpressError
from bitpress.evaluation.subjects import Subject

Results = dict[str, dict[str, float]]


def check_installed() -> None:
    """Refuse to run tasks without the package.

    Raises:
        BitpressError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise BitpressError('tasks are run by lm-eval, which is not installed: pip install "bitpress[eval]".')


def run_tasks(
    subject: Subject, tasks: Sequence[str | dict[str, Any]], *, batch_size: int, num_samples: int | None
) -> Results:
    """Run tasks of lm-eval, with its defaults.

    Args:
        subject: the model, of transformers, with its tokenizer.
        tasks: names of tasks or groups, paths of YAML files, or configurations.
        batch_size: requests that run together.
        num_samples: documents of each task at most.

    Returns:
        The figures of each task by the names that lm-eval has for them ("acc,none", "acc_stderr,none").

    Raises:
        BitpressError: lm-eval is not installed, or does not know a task.
    """
    check_installed()
    from lm_eval import simple_evaluate  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    with _own_random_state():
        model: Any = subject.model
        wrapped = HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=batch_size)
        try:
            found = simple_evaluate(wrapped, tasks=list(tasks), limit=num_samples, log_samples=False)
        except (KeyError, FileNotFoundError) as error:
            raise BitpressError(f"lm-eval does not run the tasks {', '.join(map(str, tasks))}: {error}") from error
    return {task: _numbers(figures) for task, figures in (found or {}).get("results", {}).items()}


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in figures.items()
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    }


@contextmanager
def _own_random_state() -> Iterator[None]:
    """lm-eval seeds every generator of the process; inside the ``with`` it may."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
