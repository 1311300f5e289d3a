"""lm-eval's tasks: only where lm-eval is installed, which is a heavy extra."""

import json
import random

import pytest
import tiny
import torch
from compressing import WORDS, rtn, tokenizer

from bitpress import BitpressError, evaluate, oneshot

pytest.importorskip("lm_eval", reason='tasks need lm-eval: pip install "bitpress[eval]"')

TASK = """
task: tiny_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": f"{a} {b}", "choices": [b, f"{a} {a} {b}", a], "answer": i % 3}
        for i, (a, b) in enumerate(zip(WORDS, WORDS[30:60], strict=False))
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tiny.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
    return folder


def test_its_figures_are_ours(task):
    model, original = oneshot(tiny.llama(), recipe=rtn(bits=2)), tiny.llama()
    before, state = tiny.snapshot(model), random.getstate()
    drawn = torch.get_rng_state()
    found = evaluate(
        model,
        original=original,
        choices=task / "questions.jsonl",
        tasks=[str(task / "tiny.yaml")],
        tokenizer=tokenizer(),
        batch_size=4,
    )
    for figures, accuracy, norm in (
        (found.tasks, found.choices.accuracy, found.choices.accuracy_norm),
        (found.original_tasks, found.choices.original_accuracy, found.choices.original_accuracy_norm),
    ):
        assert figures["tiny_questions"]["acc,none"] == pytest.approx(accuracy)
        assert figures["tiny_questions"]["acc_norm,none"] == pytest.approx(norm)
    assert found.tasks["tiny_questions"]["acc_stderr,none"] == pytest.approx(found.choices.standard_error)
    assert f"{found.choices.accuracy:.4f}" in "\n".join(found.lines())
    tiny.assert_unchanged(model, before)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), drawn)


def test_an_unknown_task():
    with pytest.raises(BitpressError, match="no_such_task"):
        evaluate(tiny.llama(), tasks=["no_such_task"], tokenizer=tokenizer())
