"""examples/awq.py as a user runs it."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "awq.py"
SECTIONS = [
    "1. The original weights",
    "2. The quantization, layer by layer",
    "3. The quantized weights",
    "4. The error analysis",
    "5. The outputs before and after",
    "6. The compression",
]
RUNS = {
    "8 bits": ["--quantization-bits", "8"],
    "4 bits": ["--quantization-bits", "4", "--symmetric"],
    "wide": ["--quantization-bits", "4", "--input-dim", "128", "--hidden-dims", "256", "512", "256", "10"],
}


def start(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLE), "--device", "cpu", *options]
    return subprocess.Popen(command, env=environment, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def printed():
    """What each run prints; they run side by side."""
    running = {name: start("--epochs", "8", *options) for name, options in RUNS.items()}
    found = {}
    for name, process in running.items():
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found[name] = out
    return found


@pytest.mark.parametrize("run", RUNS)
def test_sections_are_in_order(printed, run):
    places = [printed[run].index(section) for section in SECTIONS]
    assert places == sorted(places)


@pytest.mark.parametrize("run", RUNS)
def test_every_layer_is_in_every_section_about_layers(printed, run):
    parts = re.split("|".join(map(re.escape, SECTIONS)), printed[run])[1:]
    for index in (0, 1, 2, 3, 5):
        assert all(f"layers.{layer}" in parts[index] for layer in range(4)), SECTIONS[index]


@pytest.mark.parametrize("run", RUNS)
def test_no_table_is_cut(printed, run):
    assert "…" not in printed[run]
    lines = printed[run].splitlines()
    assert any(line.startswith("┃ layer") and line.endswith("saved ┃") for line in lines)


def test_compression_adds_up(printed):
    """64 -> 128 -> 256 -> 128 -> 10 at 8 bits: a byte a value, and no more than a ninth on top."""
    row = next(line for line in printed["8 bits"].splitlines() if line.startswith("│ all"))
    before, after, integers, scales, zero_points, other, ratio, saved = re.findall(r"[\d.,]+", row)
    sizes = [int(n.replace(",", "")) for n in (integers, scales, zero_points, other)]
    values = 64 * 128 + 128 * 256 + 256 * 128 + 128 * 10
    assert int(before.replace(",", "")) == 4 * values
    assert int(after.replace(",", "")) == sum(sizes)
    assert sizes[:2] == [values, values // 64 * 4]
    assert float(ratio) == pytest.approx(4 * values / sum(sizes), abs=0.01)
    assert float(saved) == pytest.approx(100 - 100 * sum(sizes) / (4 * values), abs=0.1)


def test_most_affected_layers_come_first(printed):
    section = printed["4 bits"].partition(SECTIONS[3])[2].partition("Accumulated")[0]
    errors = [float(n) for n in re.findall(r"│ layers\.\d │ +[\d.]+% │ +([\d.]+)%", section)]
    assert len(errors) == 4
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("options", [["--input-dim", "128"], ["--hidden-dims", "32", "7"]])
def test_digits_of_another_shape_are_refused(monkeypatch, capsys, options):
    example = runpy.run_path(str(EXAMPLE))
    monkeypatch.setattr(sys, "argv", ["awq.py", "--data", "digits", *options])
    with pytest.raises(SystemExit):
        example["parse_options"]()
    assert "use --data synthetic" in capsys.readouterr().err
