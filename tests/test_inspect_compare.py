"""inspect and compare: checkpoints read layer by layer, without a model."""

import itertools
import json
import shutil

import pytest
import tiny
import torch
from compressing import awq, rtn, scheme, token_ids, tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file

from bitpress import BitpressError, QuantizationModifier, SmoothQuantModifier, compare, convert, inspect, load, oneshot
from bitpress.checkpoints.contents import Contents
from bitpress.compare import beyond_scales
from bitpress.quantization import QuantizationScheme, preset_name_to_scheme
from bitpress.report.describing import describe, in_order, matches, pattern, size
from bitpress.report.histogram import Histogram

PRESETS = ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "INT8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.llama().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    oneshot(folder / "model", recipe=rtn(), output_dir=folder / "rtn")
    oneshot(folder / "model", token_ids(2), awq(), output_dir=folder / "awq")
    for kind in ("awq", "gptq"):
        convert(folder / "rtn", folder / f"as-{kind}", format=kind)
    return folder


def shown(found, width=160):
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(found, highlight=False)
    return console.export_text()


def mixed(folder):
    """Two schemes, one of them of whole rows with activations."""
    groups = {
        "attention": scheme(targets=["re:.*self_attn.*"], bits=8, strategy="channel", symmetric=True),
        "mlp": scheme(targets=["re:.*mlp.*"], bits=3),
    }
    groups["attention"] = QuantizationScheme(
        targets=["re:.*self_attn.*"],
        weights=groups["attention"].weights,
        input_activations={"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True},
    )
    oneshot(folder / "model", recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
            output_dir=folder / "mixed", overwrite=True)  # fmt: skip
    return folder / "mixed"


@pytest.mark.parametrize("name", ["rtn", "awq", "as-awq", "as-gptq", "mixed"])
def test_the_weights_are_those_of_the_loaded_model(name, folder):
    directory = mixed(folder) if name == "mixed" else folder / name
    model = load(folder / "rtn" if name.startswith("as-") else directory, packed=False)
    contents = Contents.of(directory)
    quantized = [part for part in contents.parts.values() if part.scheme is not None]
    assert len(quantized) == 14
    for part in contents.parts.values():
        exact = model.get_submodule(part.name).weight
        # Foreign formats hold scales in float16.
        tolerance = {"rtol": 1e-3, "atol": 1e-6} if name.startswith("as-") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(contents.weight(part), exact.detach().float(), **tolerance)
        assert part.shape == tuple(exact.shape)


def test_inspect_counts_every_byte(folder):
    found = inspect(folder / "rtn")
    assert found.format == "compressed-tensors"
    stored = load_file(folder / "rtn" / "model.safetensors")
    assert found.nbytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert sum(layer.nbytes for layer in found.layers) + found.rest == found.nbytes
    by_name = {layer.name: layer for layer in found.layers}
    layer = by_name["model.layers.1.mlp.down_proj"]
    scales = stored["model.layers.1.mlp.down_proj.weight_scale"]
    assert (layer.shape, layer.scheme, layer.dtype) == ((64, 96), "int4 group 32 asymmetric", None)
    assert layer.scales == (float(scales.min()), float(scales.max()))
    assert 4 < layer.bits < 6
    assert by_name["lm_head"].dtype == "float32"
    assert sum(each.count for each in found.histogram.bins()) == sum(
        t.numel() for name, t in stored.items() if name.endswith("weight_scale")
    )
    assert json.loads(json.dumps(found.to_dict()))["layers"]["lm_head"]["bits"] == 32


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_other_formats_are_inspected(kind, folder):
    found = inspect(folder / f"as-{kind}")
    ours = {layer.name: layer for layer in inspect(folder / "rtn").layers}
    assert found.format == kind
    for layer in found.layers:
        assert (layer.shape, layer.scheme, layer.dtype) == (
            ours[layer.name].shape, ours[layer.name].scheme, ours[layer.name].dtype,
        )  # fmt: skip
        if layer.dtype is None:
            assert layer.scales == pytest.approx(ours[layer.name].scales, rel=1e-3)


def test_a_gptq_checkpoint_that_says_it_is_symmetric(folder, tmp_path):
    oneshot(folder / "model", recipe=rtn(symmetric=True), output_dir=tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", format="gptq")
    assert {layer.scheme for layer in inspect(tmp_path / "b").layers if not layer.dtype} == {"int4 group 32"}
    assert all(each.error < 1e-6 for each in compare(tmp_path / "a", tmp_path / "b").layers)


def test_inspect_of_two_schemes_and_of_some_layers(folder):
    found = inspect(mixed(folder), ["*.0.*"])
    kinds = {layer.name: layer.scheme for layer in found.layers}
    assert len(kinds) == 7
    assert kinds["model.layers.0.self_attn.q_proj"] == "int8 channel, inputs int8 token dynamic"
    assert kinds["model.layers.0.mlp.up_proj"] == "int3 group 32 asymmetric"
    assert "model.layers.0.mlp.up_proj" in shown(found)
    assert "model.layers.*.mlp.up_proj (2)" in shown(inspect(folder / "mixed"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_inspected_and_compared(name, tmp_path):
    model = tiny.llama(hidden_size=128, intermediate_size=256).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    oneshot(model, token_ids(2), QuantizationModifier(scheme=name, ignore=["lm_head"]), output_dir=tmp_path / "out")
    found = inspect(tmp_path / "out")
    quantized = [layer for layer in found.layers if layer.dtype is None]
    assert {layer.scheme for layer in quantized} == {describe(preset_name_to_scheme(name, ["Linear"]))}
    assert all(0 < layer.scales[0] <= layer.scales[1] for layer in quantized)
    errors = {each.name: each.error for each in compare(tmp_path / "model", tmp_path / "out").layers}
    assert all(0 < errors[layer.name] < 0.05 for layer in quantized)
    assert errors["lm_head"] == errors["model.embed_tokens"] == 0


def test_the_error_is_that_of_the_loaded_weights(folder):
    found = compare(folder / "model", folder / "rtn")
    model, loaded = tiny.llama(), load(folder / "rtn", packed=False)
    report = json.loads((folder / "rtn" / "report.json").read_text())["layers"]
    for each in found.layers:
        weight = model.get_submodule(each.name).weight.detach().double()
        error = float((loaded.get_submodule(each.name).weight.detach() - weight).square().sum() / weight.square().sum())
        assert each.error == pytest.approx(error, rel=1e-4, abs=1e-12)
        if each.name in report:
            # By one row in sixteen.
            assert each.error == pytest.approx(report[each.name]["weight_error"], rel=0.5)
            assert each.kinds == ("float32", "int4 group 32 asymmetric")
    errors = [each.error for each in found.layers]
    assert errors == sorted(errors, reverse=True)
    assert not found.same
    assert [each.name for each in found.layers if not each.error] == ["lm_head", "model.embed_tokens"]


def test_what_moves_scales_is_told_from_what_rounds(tmp_path, folder):
    moved = SmoothQuantModifier(smoothing_strength=0.9)
    w16 = QuantizationModifier(config_groups={"g": scheme(bits=8)}, ignore=["lm_head"])
    oneshot(folder / "model", token_ids(2), [moved, w16], output_dir=tmp_path / "out")
    by_name = {each.name: each for each in compare(folder / "model", tmp_path / "out").layers}
    smoothed = by_name["model.layers.0.self_attn.q_proj"]
    assert smoothed.error > 0.01
    assert smoothed.beyond_scales < 1e-3


def test_scales_are_found_exactly():
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    scaled = torch.rand(24, 1).add(0.1) * weight * torch.rand(40).add(0.1)
    assert beyond_scales(weight, scaled) < 1e-5
    noise = torch.randn(24, 40)
    energy = scaled.square().sum()
    noisy = scaled + noise * (0.1 * energy / noise.square().sum()).sqrt()
    assert 0.03 < beyond_scales(weight, noisy) < 0.1
    assert beyond_scales(torch.zeros(3, 4), torch.zeros(3, 4)) == 0


def test_a_checkpoint_is_the_same_as_itself(folder):
    found = compare(folder / "rtn", folder / "rtn")
    assert found.same
    assert "All 16 weights are the same." in shown(found)


def test_layers_that_only_one_has_and_other_shapes(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    stored["extra.weight"] = stored.pop("model.layers.0.mlp.up_proj.weight")
    stored["lm_head.weight"] = stored["lm_head.weight"][:100].contiguous()
    save_file(stored, tmp_path / "b" / "model.safetensors")
    found = compare(folder / "model", tmp_path / "b")
    assert found.missing == (("model.layers.0.mlp.up_proj",), ("extra",))
    assert found.other_shapes == ("lm_head",)
    assert not found.same
    assert "1 are only in A: model.layers.0.mlp.up_proj" in shown(found)
    assert found.to_dict()["only_in_second"] == ["extra"]


def test_only_so_many_are_printed(folder):
    said = shown(compare(folder / "model", folder / "rtn", shown=2))
    assert said.count("_proj") == 2
    assert "and 12 more" in said


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(BitpressError, match="has no layer nope: it has "):
        inspect(folder / "rtn", ["nope"])
    with pytest.raises(BitpressError, match=r"did you mean .*rtn"):
        inspect(folder / "rtm")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(BitpressError, match="is a file: give the directory"):
        compare(tmp_path / "a.gguf", folder / "rtn")
    with pytest.raises(BitpressError, match=r"model.safetensors is missing"):
        inspect(tmp_path)


def test_a_histogram_counts_every_number_once():
    histogram = Histogram()
    histogram.add(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    histogram.add(torch.tensor([-4.0]))
    bins = histogram.bins(4)
    assert sum(each.count for each in bins) == 4
    assert histogram.zeros == 1
    assert bins[0].low == 0.5
    assert bins[-1].high > 4 >= bins[-1].low
    assert all(a.high == pytest.approx(b.low) for a, b in itertools.pairwise(bins))
    lines = list(histogram.lines(width=10))
    assert "█" * 10 in lines[0]
    assert lines[-1].split() == ["0", "1"]
    assert Histogram().bins() == []


def test_words():
    assert [size(n) for n in (0, 999, 1000, 9999, 123456, 999_999, 2.5e9)] == [
        "0 B", "999 B", "1 kB", "10 kB", "123 kB", "1 MB", "2.5 GB",
    ]  # fmt: skip
    assert pattern("model.layers.11.mlp.experts.3.up_proj") == "model.layers.*.mlp.experts.*.up_proj"
    assert pattern("0.conv1d") == "*.conv1d"
    assert matches("a.1.b", ["a.*.b"])
    assert not matches("a.1.b", ["a.*", "b"][1:])
    assert describe(None) == "dense"
    assert sorted(["h.10.a", "h.2.a", "g", "h.2"], key=in_order) == ["g", "h.2", "h.2.a", "h.10.a"]
