"""report.html: a page of its own that says what report.json says, whatever the names in it are."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from bitpress.report import page, plots
from bitpress.report.html import tag
from bitpress.report.words import duration, percent, size

HOSTILE = "</td><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>\"&"
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """What is in a page; every element must be closed where it was opened."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def of(self, kind):
        return [attributes for name, attributes in self.elements if name == kind]

    @property
    def text(self):
        return "\n".join(self.words)


def layer(error, **more):
    return {
        "shape": [64, 48], "bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False,
        "weight_error": error / 2, "relative_error": error, "stored_bytes": 2000, "dense_bytes": 12288,
        "steps": {"nearest": 3 * error, "AWQModifier": 2 * error, "GPTQModifier": error},
        "input": {"largest": 9.0, "median": 0.5, "channel": 7}, **more,
    }  # fmt: skip


def report(names=("q_proj", "up_proj"), blocks=3, **more):
    members = {f"layers.{i}": [f"layers.{i}.{n}" for n in names] for i in range(blocks)}
    layers = {name: layer(0.01 * (1 + i)) for i, name in enumerate(n for each in members.values() for n in each)}
    spread = {kind: {"low": -1.0, "high": 2.0, "counts": [1, 5, 2]} for kind in ("weights", "scales")}
    return {
        "model": {"name": "some/model", "class": "SomeModel"}, "pipeline": "sequential", "samples": 4, "tokens": 2048,
        "seconds": {"calibrate": 12.5, "solve": 61.0}, "resident_bytes": {"calibrate": 3 << 30, "solve": 2 << 30},
        "quantized_layers": len(layers), "weight_bytes_before": 12288 * len(layers),
        "weight_bytes_after": 2000 * len(layers), "model_bytes_before": 90_000, "model_bytes_after": 34_567,
        "bits_per_weight": 5.21, "layers": layers,
        "blocks": {
            name: {"layers": each, "own_error": 0.001 * (i + 1), "accumulated_error": 0.002 * (i + 1)}
            for i, (name, each) in enumerate(members.items())
        },
        "histograms": {next(iter(layers)): spread}, "attentions": {},
        "mappings": [{
            "smooth_layer": "layers.0.norm", "balance_layers": ["layers.0.q_proj"], "source": "discovery",
            "proof": 3.4e-7, "error_before": 8.0, "error": 2.0,
        }],
        "layers_without_mapping": {"layers.1.up_proj": "nothing can absorb a scale"},
        "experts_with_few_tokens": {}, "recipe": "- GPTQModifier: {scheme: W4A16}\n", "versions": {"torch": "2.13.0"},
        **more,
    }  # fmt: skip


def test_it_is_well_formed_and_loads_nothing():
    read = Reader(page(report()))
    assert not read.of("script") + read.of("link") + read.of("img") + read.of("iframe")
    for _, attributes in read.elements:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", page(report()))
    assert read.of("html")[0]["lang"] == "en"
    assert any(each.get("name") == "viewport" for each in read.of("meta"))


def test_every_plot_is_read_out_and_every_table_has_a_head():
    read = Reader(page(report()))
    assert len(read.of("svg")) >= 9
    for each in read.of("svg"):
        assert each["role"] == "img"
        assert len(each["aria-label"]) > 20
    assert len(read.of("caption")) == len(read.of("table")) == len(read.of("thead")) > 4
    assert all(each["scope"] in ("col", "row") for each in read.of("th"))
    anchors = {each["id"] for each in read.of("section")}
    assert {each["href"][1:] for each in read.of("a")} == anchors


def test_it_says_what_the_json_says():
    told = report()
    text = Reader(page(told)).text
    for name, figures in told["layers"].items():
        assert name in text
        assert percent(figures["relative_error"]) in text
    for each in told["blocks"].values():
        assert percent(each["own_error"]) in text
        assert percent(each["accumulated_error"]) in text
    for part in (
        size(told["weight_bytes_after"]), size(told["model_bytes_after"]), "5.21", "18 ×", "3.4e-07", "25 %",
        duration(61.0), "nothing can absorb a scale", told["recipe"], "2.13.0", "2,048", "some/model",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("hostile", [HOSTILE, "a]]>b", "<!--", "'\"><svg onload=x>"])
def test_names_and_recipes_stay_text(hostile):
    told = report(names=(hostile, "other"))
    told |= {"recipe": hostile, "model": {"name": hostile, "class": hostile}, "versions": {hostile: hostile}}
    told["mappings"][0]["smooth_layer"] = hostile
    told["layers_without_mapping"] = {hostile: hostile}
    told["evaluation"] = {"continuations": [{"prompt": hostile, "model": hostile, "original": "x" + hostile}]}
    read, plain = Reader(page(told)), Reader(page(report()))
    assert {name for name, _ in read.elements} - {name for name, _ in plain.elements} <= {"h3", "blockquote"}
    assert not any(name.startswith("on") or name == "src" for _, attributes in read.elements for name in attributes)
    assert f"layers.0.{hostile}" in read.text


def test_what_is_not_known_is_left_out():
    """As of a model without data, and as an older bitpress has written it."""
    old = {
        "pipeline": "datafree", "samples": 0, "tokens": 0, "seconds": {"solve": 1.0}, "quantized_layers": 1,
        "weight_bytes_before": 100, "weight_bytes_after": 20, "attentions": {}, "mappings": [],
        "layers": {"net.0": {"shape": [5, 5], "bits": 4, "weight_error": 0.5, "stored_bytes": 20}},
        "layers_without_mapping": {}, "experts_with_few_tokens": {}, "versions": {"bitpress": "0.1.0"},
    }  # fmt: skip
    read = Reader(page(old))
    assert "50 %" in read.text
    assert "network" not in {each["id"] for each in read.of("section")}


def test_an_evaluation_shows_where_the_models_part():
    told = report(evaluation={
        "perplexity": {"perplexity": 12.3456, "tokens": 999},
        "agreement": {"original_perplexity": 11.1111, "divergence": 0.01234, "top1": 0.9},
        "continuations": [{"prompt": "Once", "model": " upon a hill", "original": " upon a time"}],
    })  # fmt: skip
    text = page(told)
    assert '<span class="changed">hill</span>' in text
    for part in ("12.3456", "11.1111", "0.01234", "90 %", " upon a time"):
        assert part in Reader(text).text


def test_plots_are_svg():
    drawn = [
        plots.bars("b", [("x", 1.0), ("y", 0.0)], percent, second=[2.0, 0.0]),
        plots.bars("none", [], percent),
        plots.line("l", ["a", "b", "c"], [0.1, None, 0.3], percent, "axis"),
        plots.line("one", ["a"], [0.0], percent, "axis"),
        plots.heat("h", ["r"], ["c", "d"], {(0, 0): 0.0, (0, 1): 0.5}, percent),
        plots.histogram("i", 0.0, 0.0, [7], "axis"),
    ]
    for each in drawn:
        root = ElementTree.fromstring(each)  # noqa: S314
        numbers = [float(v) for e in root.iter() for k, v in e.items() if k in ("x", "y", "width", "height")]
        assert all(abs(n) < 1000 for n in numbers)


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(plots.bars("b", [("x", 2.0), ("y", 1.0)], percent))  # noqa: S314
    first, second = (float(e.get("width")) for e in root.iter("rect"))
    assert first == pytest.approx(2 * second, rel=0.01)


@pytest.mark.parametrize("greatest", [1e-9, 0.037, 1, 2.5, 999.9, 1e12, 0, float("inf"), float("nan")])
def test_ticks_are_round_and_enclose(greatest):
    found = plots.ticks(greatest)
    assert found[0] == 0
    assert 2 <= len(found) <= 6
    if 0 < greatest < float("inf"):
        assert found[-2] < greatest <= found[-1] * (1 + 1e-9)


def test_attributes_are_escaped():
    assert tag("p", "<b>", class_='"x') == '<p class="&quot;x">&lt;b&gt;</p>'
