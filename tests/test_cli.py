"""The command line."""

import inspect
import json
import logging
import re

import pytest
import tiny
import torch
from compressing import awq, rtn, sentences, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bitpress import Recipe
from bitpress.cli import app
from bitpress.cli.options import complete_recipe
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
        *["--format", "awq", "--tokenizer", "words", "--processor", "eyes", "--no-shuffle-calibration-samples"],
        *["--sequential-targets", "Layer", "--sequential-targets", "re:h.*", "--moe-min-tokens", "9"],
        *["--dataset-config-name", "english"],
    )
    assert result.exit_code == 0, result.output
    assert given == {
        "args": ("a-model", "data", "w8a16"),
        "output_dir": tmp_path / "out",
        "recipe_args": {"group_size": 64, "ignore": ["lm_head", "re:a=b"]},
        "text_column": "prose",
        "splits": "train[:3]",
        "dataset_config_name": "english",
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
        "tokenizer": "words",
        "processor": "eyes",
        "shuffle_calibration_samples": False,
        "sequential_targets": ["Layer", "re:h.*"],
        "moe_min_tokens": 9,
        "progress": True,
    }


def test_flags_are_the_arguments_of_python():
    """But for those that a shell cannot say, or that are said otherwise."""
    otherwise = {"model", "recipe", "progress", "dataset_path", "others"}
    of_python = set(inspect.signature(oneshot).parameters) - otherwise
    (command,) = [each for each in app.registered_commands if each.callback.__name__ == "oneshot"]
    names = set(inspect.signature(command.callback).parameters) - {"model", "recipe", "as_json", "quiet", "verbose"}
    assert names == of_python
    said = run("oneshot", "--help").output
    assert "--recipe-arg" in said
    assert "--output" in said


@pytest.mark.parametrize(("output", "argument"), [("--output", "--recipe-arg"), ("--output-dir", "--arg")])
def test_both_names_of_an_option(output, argument, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("bitpress.oneshot", lambda *args, **kwargs: given.update(kwargs))
    result = run("oneshot", "m", "--recipe", "w4a16-fast", output, tmp_path / "out", argument, "bits=3", "--quiet")
    assert result.exit_code == 0, result.output
    assert (given["output_dir"], given["recipe_args"], given["progress"]) == (tmp_path / "out", {"bits": 3}, False)


def test_without_data(folder, tmp_path):
    (tmp_path / "rtn.yaml").write_text(Recipe.of(rtn()).to_yaml())
    changed = {"recipe": tmp_path / "rtn.yaml", "dataset": None}
    result = run("oneshot", folder / "model", *options(folder, tmp_path / "out", **changed))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").exists()


ERRORS = {
    "unknown recipe": ({"recipe": "awq-w4a16-asymm"}, "did you mean 'awq-w4a16-asym'"),
    "recipe file": ({"recipe": "no.yaml"}, "does not exist"),
    "recipe file beside": ({"recipe": "RECIPE"}, "recipe.yaml'"),
    "dataset file beside": ({"dataset": "DATASET"}, "novel.txt'"),
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
    near = {"RECIPE": folder / "recipes.yaml", "DATASET": folder / "nivel.txt"}
    changed = {name: near.get(value, value) for name, value in changed.items()}
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
    assert '--recipe-arg bits=4 group_size=128 symmetric=false ignore=["lm_head"]' in result.stdout
    assert result.stdout == run("recipes", "list").stdout
    listed = json.loads(run("recipes", "--json").stdout)
    assert list(listed) == list(shipped_recipes())
    assert listed["w4a16-fast"]["args"]["bits"] == 4


def test_a_recipe_is_shown_as_it_is():
    result = run("recipes", "show", "w4a16-fast")
    assert result.stdout == shipped_recipes()["w4a16-fast"].read_text()
    wrong = run("recipes", "show", "w4a16-fats")
    assert wrong.exit_code == 2
    assert "did you mean 'w4a16-fast'" in wrong.stderr


def test_completion_knows_the_recipes():
    assert [name for name, _ in complete_recipe("w4a16-f")] == ["w4a16-fast"]
    assert len(complete_recipe("")) == len(shipped_recipes())
    assert all(about for _, about in complete_recipe(""))


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
    for command in [
        [],
        ["recipes"],
        ["recipes", "show"],
        *([each.callback.__name__] for each in app.registered_commands),
    ]:
        assert run(*command, "--help").exit_code == 0
    assert "Exit status" in run("--help").output


def test_version():
    assert re.fullmatch(r"bitpress \d+\.\d+\S*\n", run("--version").stdout)


def test_a_command_that_is_misspelt():
    result = run("inspekt")
    assert result.exit_code == 2
    assert "inspect" in result.stderr


def test_an_interrupted_command(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitpress.oneshot", interrupted)
    result = run("oneshot", "m", "--recipe", "w8a16", "--output", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "bitpress: interrupted"


def test_records_are_shown_as_far_as_is_asked_for(tmp_path, monkeypatch):
    def say(*args, **kwargs):
        logging.getLogger("bitpress.anything").info("by the way")
        logging.getLogger("bitpress.anything").warning("take care")

    monkeypatch.setattr("bitpress.oneshot", say)
    words = ["oneshot", "m", "--recipe", "w8a16", "--output", tmp_path / "out"]
    assert run(*words).stderr == run(*words, "--quiet").stderr == "WARNING: take care\n"
    assert run(*words, "--verbose").stderr == "INFO: by the way\nWARNING: take care\n"
    logger = logging.getLogger("bitpress")
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)


@pytest.fixture(scope="module")
def compressed(folder):
    """Two checkpoints, and what the command said of the second."""
    for bits in (4, 3):
        stated = ["--recipe-arg", "group_size=32", "--recipe-arg", f"bits={bits}"]
        changed = {"recipe": "w4a16-fast", "output-dir": folder / f"out{bits}"}
        result = run("oneshot", folder / "model", *options(folder, None, **changed), *stated, "--quiet", "--json")
        assert result.exit_code == 0, result.output
    return folder, result


def test_the_result_of_oneshot_as_json(compressed):
    folder, result = compressed
    told = json.loads(result.stdout)
    assert told["output_dir"] == str(folder / "out3")
    assert told["bytes"]["after"] < told["bytes"]["before"]
    assert told["layers"] == 14
    assert len(told["worst"]) == 5
    assert result.stderr == ""


def test_inspect(compressed):
    folder, _ = compressed
    result = run("inspect", folder / "out4")
    assert result.exit_code == 0, result.output
    assert "model.layers.*.mlp.down_proj (2)" in result.stdout
    assert "█" in result.stdout
    told = json.loads(run("inspect", folder / "out4", "--layers", "*.up_proj", "--json").stdout)
    assert list(told["layers"]) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert "model.layers.1.mlp.up_proj " in run("inspect", folder / "out4", "--each").stdout


def test_compare(compressed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, _ = compressed
    result = run("compare", folder / "out4", folder / "out3", "--shown", "1")
    assert result.exit_code == 0, result.output
    assert "int4 group 32 asymmetric → int3 group 32 asymmetric" in result.stdout
    assert result.stdout.count("_proj") == 1
    told = json.loads(run("compare", folder / "out4", folder / "out3", "--json").stdout)
    assert not told["same"]
    errors = [layer["error"] for layer in told["layers"].values()]
    assert errors == sorted(errors, reverse=True)


def test_report(compressed):
    folder, _ = compressed
    result = run("report", folder / "out4", "--worst", "1")
    assert result.exit_code == 0, result.output
    assert "14 layers: " in result.stdout
    assert result.stdout.count("_proj") == 1
    told = json.loads(run("report", folder / "out4", "--json").stdout)
    assert told["samples"] == 6


@pytest.mark.parametrize("words", [["inspect", "no-such"], ["compare", "no-such", "no"], ["report", "no-such"]])
def test_a_checkpoint_that_is_not_there(words):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("bitpress: ")
    assert "no-such" in result.stderr
    assert "Traceback" not in result.output
