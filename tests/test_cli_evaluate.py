"""bitpress evaluate."""

import importlib.util
import json

import pytest
import tiny
from compressing import WORDS, rtn, sentences, tokenizer
from safetensors.torch import load_file
from typer.testing import CliRunner

from bitpress import evaluate, oneshot
from bitpress.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.llama().save_pretrained(folder / "original")
    tokenizer().save_pretrained(folder / "original")
    oneshot(tiny.llama(), recipe=rtn(bits=3), tokenizer=tokenizer(), output_dir=folder / "compressed")
    (folder / "text.txt").write_text("\n\n".join(sentences()))
    rows = [
        {"question": f"{a} {b}", "choices": [b, a], "answer": "A"} for a, b in zip(WORDS, WORDS[9:20], strict=False)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(*words):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def test_all_of_it_as_json(folder, tmp_path):
    result = run(
        *[folder / "compressed", "--original", folder / "original", "--dataset", folder / "text.txt"],
        *["--choices", folder / "questions.jsonl", "--max-seq-length", "32", "--stride", "16", "--num-samples", "5"],
        *["--batch-size", "2", "--worst", "3", "--per-token", tmp_path / "tokens.safetensors", "--json"],
    )
    assert result.exit_code == 0, result.output
    same = evaluate(
        folder / "compressed",
        folder / "text.txt",
        original=folder / "original",
        choices=folder / "questions.jsonl",
        max_seq_length=32,
        stride=16,
        num_samples=5,
        batch_size=2,
        worst=3,
    )
    told = json.loads(result.stdout)
    assert told == json.loads(json.dumps(same.to_dict()))
    assert told["perplexity"]["windows"] == told["choices"]["questions"] == 5
    assert told["perplexity"]["bits_per_byte"] > 0
    assert 0 < told["agreement"]["divergence"] < told["agreement"]["maximum"]
    assert len(told["agreement"]["worst"]) == 3
    assert load_file(tmp_path / "tokens.safetensors")["divergence"].shape == (31 + 4 * 16,)


def test_for_people(folder):
    result = run(folder / "original", "--dataset", folder / "text.txt", "--max-seq-length", "64")
    assert result.exit_code == 0, result.output
    assert str(folder / "original") in result.stdout
    assert "bits a byte" in result.stdout
    assert "divergence" not in result.stdout


ERRORS = {
    "nothing": ([], "dataset="),
    "no such file": (["--dataset", "no.txt"], "no.txt"),
    "no such questions": (["--choices", "no.jsonl"], "no.jsonl"),
    "no such original": (["--dataset", "TEXT", "--original", "/no/such"], "/no/such"),
    "figures of tokens": (["--dataset", "TEXT", "--per-token", "tokens.csv"], ".safetensors or a .json"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_exit_code_2(case, folder):
    words, message = ERRORS[case]
    result = run(folder / "original", *[folder / "text.txt" if word == "TEXT" else word for word in words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="says what is said without lm-eval")
def test_tasks_without_lm_eval(folder):
    result = run(folder / "original", "--tasks", "arc_easy")
    assert result.exit_code == 2
    assert 'pip install "bitpress[eval]"' in result.stderr
