"""The figures of report.json in the terminal."""

import json

import pytest
from rich.console import Console

from bitpress import BitpressError
from bitpress.report.terminal import read_report, render, short

REPORT = {
    "samples": 4,
    "tokens": 2048,
    "seconds": {"solve": 3.0, "calibrate": 9.5},
    "quantized_layers": 2,
    "weight_bytes_before": 4000,
    "weight_bytes_after": 1000,
    "layers": {
        "a": {"shape": [10, 100], "relative_error": 0.01, "weight_error": 0.5},
        "b": {"shape": [10, 100], "relative_error": 0.02, "weight_error": 0.1},
    },
    "mappings": [{}, {}, {}],
    "layers_without_mapping": {"b": "why"},
    "experts_with_few_tokens": {"a": 3},
    "versions": {"bitpress": "1.2"},
}


def shown(directory, report, worst=5):
    console = Console(record=True, width=100, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(render(directory, report, worst))
    return captured.get()


def test_the_figures():
    found = short(REPORT, worst=1)
    assert found["bits_per_weight"] == 4
    assert found["bytes"] == {"before": 4000, "after": 1000}
    assert (found["error"], found["worst"], found["mappings"]) == ("relative_error", {"b": 0.02}, 3)
    assert len(found["warnings"]) == 2


def test_for_people(tmp_path):
    said = shown(tmp_path, REPORT)
    assert "2 layers: 4 kB → 1 kB, 4.00 times smaller, 4.00 bits a weight" in said
    assert "calibrated with 4 samples, 2,048 tokens, 3 mappings" in said
    assert "12.5 s: calibrate 9.5 s, solve 3.0 s" in said
    assert said.index("2.00e-02") < said.index("1.00e-02")
    assert "report.html" not in said
    (tmp_path / "report.html").touch()
    assert f"{tmp_path / 'report.html'}" in shown(tmp_path, REPORT).replace("\n", "")


@pytest.mark.parametrize("left_out", REPORT)
def test_a_report_may_lack_anything(left_out, tmp_path):
    report = {name: value for name, value in REPORT.items() if name != left_out}
    assert shown(tmp_path, report)
    assert json.dumps(short(report))


def test_an_empty_report_and_layers_without_errors(tmp_path):
    assert short({}) == {}
    assert shown(tmp_path, {}).strip() == ""
    assert "worst" not in short({"layers": {"a": {}}})
    assert short({"layers": {"a": {"weight_error": 0.1}}})["error"] == "weight_error"


def test_what_is_refused(tmp_path):
    with pytest.raises(BitpressError, match=r"report.json does not exist"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[")
    with pytest.raises(BitpressError, match="cannot be read"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(BitpressError, match="no JSON object"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    assert read_report(tmp_path / "report.json") == {}
