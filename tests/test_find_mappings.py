"""bitpress mappings: what is found, block kind by block kind, and said as a table, as JSON and as code."""

import json
from io import StringIO

import pytest
import tiny
from architectures import ARCHITECTURES
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from bitpress import AWQMapping, BitpressError, find_mappings
from bitpress.cli import app

STRUCTURES = [
    "llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "jetmoe", "mllama", "whisper", "nemotron_h",
    "olmo_hybrid", "gemma3", "falcon_h1", "gpt2", "t5", "phi3", "qwen3_next",
]  # fmt: skip


def pairs(report):
    """Every mapping by the names of its layers, in every kind of block."""
    return [{(line.smooth, frozenset(line.balance)) for line in kind.mappings} for kind in report.kinds]


def printed(report):
    console = Console(file=StringIO(), width=200)
    console.print(report)
    return console.file.getvalue()


def test_a_llama():
    model = tiny.llama()
    before = tiny.snapshot(model)
    report = find_mappings(model)
    tiny.assert_unchanged(model, before)
    blocks, head = report.kinds
    assert blocks.blocks == ("model.layers.0", "model.layers.1")
    assert [(line.smooth, line.balance, line.count, line.power) for line in blocks.mappings] == [
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 1, 1),
        ("self_attn.v_proj", ("self_attn.o_proj",), 1, 1),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), 1, 1),
        ("mlp.up_proj", ("mlp.down_proj",), 1, 1),
    ]
    assert all(line.source == "discovery" and line.difference < 1e-4 for line in blocks.mappings)
    assert (head.blocks, head.mappings) == (("lm_head",), ())
    assert "block of its own" in head.left[0].why


def test_experts_are_one_line():
    architecture = ARCHITECTURES["qwen3_moe"]
    report = find_mappings(architecture.build(), ignore=["lm_head"])
    lines = {line.smooth: line for kind in report.kinds for line in kind.mappings}
    assert lines["mlp.experts.*.up_proj"].balance == ("mlp.experts.*.down_proj",)
    assert lines["mlp.experts.*.up_proj"].count == 4


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_code_states_the_same(name):
    architecture = ARCHITECTURES[name]
    model, data = architecture.build(), [architecture.inputs(1, 24, 0)]
    found = find_mappings(model, data)
    namespace = {}
    exec(found.as_code(), namespace)  # noqa: S102 - our own code, to be pasted
    stated = find_mappings(model, data, mappings=namespace["mappings"])
    assert sorted(map(sorted_pairs, pairs(stated))) == sorted(map(sorted_pairs, pairs(found)))
    assert {line.source for kind in stated.kinds for line in kind.mappings} == {"user"}


def sorted_pairs(of_kind):
    return sorted((smooth, sorted(balance)) for smooth, balance in of_kind)


def test_the_table_says_all():
    architecture = ARCHITECTURES["nemotron"]
    report = find_mappings(architecture.build(), [architecture.inputs(1, 24, 0)])
    text = printed(report)
    assert "model.layers.0 and 1 more like it" in text
    assert "mlp.down_proj (squared)" in text
    for kind in report.kinds:
        for line in kind.mappings:
            assert line.smooth in text
            assert f"{line.difference:.1e}" in text


def test_the_json_is_the_report():
    report = find_mappings(tiny.llama())
    data = json.loads(json.dumps(report.to_dict()))
    assert data["model"] == "LlamaForCausalLM"
    assert data["kinds"][0]["mappings"][0]["smooth"] == "input_layernorm"


def test_an_excluded_mapping_is_left_with_the_reason():
    report = find_mappings(tiny.gemma3())
    assert not any(line.smooth == "input_layernorm" for kind in report.kinds for line in kind.mappings)
    left = [left for kind in report.kinds for left in kind.left if "self_attn.q_proj" in left.layers]
    assert left
    assert all("2522" in each.why for each in left)


def test_a_mapping_of_yours_is_proven():
    wrong = [AWQMapping("re:.*gate_proj$", ["re:.*down_proj$"])]
    with pytest.raises(BitpressError, match=r"gate_proj.*not valid in model.layers.0"):
        find_mappings(tiny.llama(), mappings=wrong)


def test_layers_that_no_stated_mapping_names_are_left():
    report = find_mappings(tiny.llama(), mappings=[AWQMapping("re:.*v_proj$", ["re:.*o_proj$"])])
    left = {name for kind in report.kinds for each in kind.left for name in each.layers}
    assert {"self_attn.q_proj", "mlp.down_proj"} <= left
    assert "self_attn.o_proj" not in left


def test_no_tokens_no_data():
    with pytest.raises(BitpressError, match=r"Sequential has no embedding of tokens.*give a dataset"):
        find_mappings(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)))


def test_data_that_lacks_what_the_forward_asks_for():
    """An encoder-decoder says so itself: its arguments all have defaults."""
    architecture = ARCHITECTURES["bart"]
    inputs = architecture.inputs(1, 8, 0)
    with pytest.raises(BitpressError, match=r"BartForConditionalGeneration cannot run .*\(attention_mask\).*Give"):
        find_mappings(architecture.build(), [{"attention_mask": inputs["attention_mask"]}])


def test_the_command(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "llama")
    run = CliRunner().invoke(app, ["mappings", str(tmp_path / "llama")])
    assert run.exit_code == 0, run.output
    assert "post_attention_layernorm" in run.output
    code = CliRunner().invoke(app, ["mappings", str(tmp_path / "llama"), "--as-code"])
    namespace = {}
    exec(code.stdout, namespace)  # noqa: S102
    assert len(namespace["mappings"]) == 4
    data = CliRunner().invoke(app, ["mappings", str(tmp_path / "llama"), "--json", "--ignore", "lm_head"])
    assert [kind["blocks"] for kind in json.loads(data.stdout)["kinds"]] == [["model.layers.0", "model.layers.1"]]
    missing = CliRunner().invoke(app, ["mappings", str(tmp_path / "nothing")])
    assert missing.exit_code == 2
    assert "nothing" in missing.output
