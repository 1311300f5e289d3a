"""The command line."""

import pytest
import tiny
import torch
from compressing import awq, rtn, sentences, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bitpress import Recipe
from bitpress.cli import app
from bitpress.oneshot import oneshot
from bitpress.session.recipe import shipped_recipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.llama().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "novel.txt").write_text("\n\n".join(sentences()))
    (folder / "recipe.yaml").write_text(Recipe.of(awq()).to_yaml())
    return folder


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def options(folder, out, **changed):
    stated = {
        "recipe": folder / "recipe.yaml",
        "dataset": folder / "novel.txt",
        "output-dir": out,
        "num-calibration-samples": 6,
        "max-seq-length": 16,
        **changed,
    }
    return [word for name, value in stated.items() if value is not None for word in (f"--{name}", value)]


def test_from_a_path_to_a_checkpoint(folder, tmp_path):
    out = tmp_path / "out"
    result = run("oneshot", folder / "model", *options(folder, out))
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(out)]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    same = oneshot(folder / "model", folder / "novel.txt", awq(), num_calibration_samples=6, max_seq_length=16)
    assert torch.equal(tiny.logits(loaded), tiny.logits(same))
    assert len(AutoTokenizer.from_pretrained(out)) == tiny.VOCABULARY
    assert Recipe.of(out / "recipe.yaml") == Recipe.of(awq())


def test_every_option_reaches_oneshot(folder, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("bitpress.oneshot", lambda *args, **kwargs: given.update(kwargs, args=args))
    result = run(
        "oneshot",
        "a-model",
        *options(folder, tmp_path / "out", recipe="w8a16", dataset="data"),
        *["--text-column", "prose", "--splits", "train[:3]", "--batch-size", "2", "--concatenate-data", "--seed", "7"],
        *["--pipeline", "basic", "--no-save-compressed", "--overwrite", "--trust-remote-code-model"],
        *["--no-moe-calibrate-all-experts", "--arg", "group_size=64", "--arg", "ignore=[lm_head, 're:a=b']"],
        *["--no-resume", "--no-stream", "--activations", "disk", "--device", "cpu", "--max-shard-size", "1GB"],
        *["--format", "awq"],
    )
    assert result.exit_code == 0, result.output
    assert given == {
        "args": ("a-model", "data", "w8a16"),
        "output_dir": tmp_path / "out",
        "recipe_args": {"group_size": 64, "ignore": ["lm_head", "re:a=b"]},
        "text_column": "prose",
        "splits": "train[:3]",
        "num_calibration_samples": 6,
        "max_seq_length": 16,
        "batch_size": 2,
        "concatenate_data": True,
        "seed": 7,
        "pipeline": "basic",
        "moe_calibrate_all_experts": False,
        "save_compressed": False,
        "format": "awq",
        "overwrite": True,
        "resume": False,
        "stream": False,
        "activations": "disk",
        "device": "cpu",
        "max_shard_size": "1GB",
        "trust_remote_code_model": True,
    }


def test_without_data(folder, tmp_path):
    (tmp_path / "rtn.yaml").write_text(Recipe.of(rtn()).to_yaml())
    changed = {"recipe": tmp_path / "rtn.yaml", "dataset": None}
    result = run("oneshot", folder / "model", *options(folder, tmp_path / "out", **changed))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").exists()


ERRORS = {
    "unknown recipe": ({"recipe": "awq-w4a16-asymm"}, "did you mean 'awq-w4a16-asym'"),
    "recipe file": ({"recipe": "no.yaml"}, "does not exist"),
    "group size": ({"recipe": "w4a16-asym", "dataset": None}, "group_size 128 does not divide"),
    "no dataset": ({"dataset": None}, "needs calibration data"),
    "dataset file": ({"dataset": "no.txt"}, "no.txt"),
    "pipeline": ({"pipeline": "sequental"}, "did you mean 'sequential'"),
    "argument": ({"recipe": "w4a16-fast", "arg": "groupsize=32"}, "did you mean 'group_size'"),
    "argument without a value": ({"recipe": "w4a16-fast", "arg": "bits"}, "write --arg bits=VALUE"),
    "argument that is no YAML": ({"recipe": "w4a16-fast", "arg": "ignore=[a"}, "is not YAML"),
    "short": ({"max-seq-length": 500}, "concatenate_data=True"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_exit_code_2(case, folder, tmp_path):
    changed, message = ERRORS[case]
    result = run("oneshot", folder / "model", *options(folder, tmp_path / "out", **changed))
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if "bitpress:" in line]
    assert line.startswith("bitpress: ")
    assert message in line
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_broken_recipe_is_one_line_too(folder, tmp_path):
    (tmp_path / "r.yaml").write_text("- AWQModifier:\n    bits: [4\n")
    result = run("oneshot", folder / "model", *options(folder, tmp_path / "out", recipe=tmp_path / "r.yaml"))
    assert result.exit_code == 2
    assert result.stderr.strip().count("\n") == 0
    assert "r.yaml, line 3: not YAML" in result.stderr


def test_an_output_directory_that_holds_a_model(folder, tmp_path):
    result = run("oneshot", folder / "model", *options(folder, folder / "model"))
    assert result.exit_code == 2
    assert "overwrite=True" in result.stderr


def test_the_recipes_are_listed():
    result = run("recipes")
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split()) > 5 for line in lines)
    assert '--arg bits=4 group_size=128 symmetric=false ignore=["lm_head"]' in result.stdout


def test_arguments_of_a_recipe(folder, tmp_path):
    out = tmp_path / "out"
    stated = ["--arg", "group_size=32", "--arg", "symmetric=true"]
    result = run("oneshot", folder / "model", *options(folder, out, recipe="w4a16-fast"), *stated)
    assert result.exit_code == 0, result.output
    saved = Recipe.of(out / "recipe.yaml").modifiers[1].config_groups["group_0"].weights
    assert (saved.group_size, saved.symmetric, saved.num_bits) == (32, True, 4)
    assert AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj.weight_scale.shape[1] == 2


def test_help():
    assert "oneshot" in run().output
    for command in ([], ["oneshot"], ["recipes"]):
        assert run(*command, "--help").exit_code == 0
