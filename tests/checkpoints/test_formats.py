"""AWQ's and GPTQ's layouts, read here by their definitions; and checkpoints that go there and back."""

import json
import logging

import compressing
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import bitpress
from bitpress import BitpressError
from bitpress.checkpoints.formats import awq, gptq
from bitpress.checkpoints.formats.layer import Layer
from bitpress.cli import app
from bitpress.quantization import QuantizationStrategy, QuantizedWeight

FOREIGN = ("awq", "gptq")


def bits_of(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers of so many bits each, from the lowest bit of the first word on: (rows, numbers)."""
    stream = (words.to(torch.int64).unsqueeze(-1) >> torch.arange(32)) & 1
    numbers = stream.flatten(1).unflatten(1, (-1, bits))
    return (numbers << torch.arange(bits)).sum(-1)


def read_awq(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight (out, in), float64."""

    def eight(words):
        nibbles = [(words.to(torch.int64) >> shift) & 15 for shift in (0, 16, 4, 20, 8, 24, 12, 28)]
        return torch.stack(nibbles, -1).flatten(1)

    codes, zeros, scales = eight(stored["qweight"]), eight(stored["qzeros"]), stored["scales"].double()
    group = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[group]) * scales[group]).T


def read_gptq(stored: dict[str, torch.Tensor], bits: int, checkpoint_format: str) -> torch.Tensor:
    """The weight (out, in), float64."""
    codes = bits_of(stored["qweight"].T, bits).T
    zeros = bits_of(stored["qzeros"], bits) + (checkpoint_format == "gptq")
    group = stored["g_idx"].long()
    return ((codes - zeros[group]) * stored["scales"].double()[group]).T


@st.composite
def weights(draw, bits=(4,)):
    """A layer with any points, scales and zero points."""
    rows, groups = 32 * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    group, count = 32 * draw(st.integers(1, 2)), draw(st.sampled_from(bits))
    symmetric, by_channel = draw(st.booleans()), draw(st.booleans())
    strategy = QuantizationStrategy.CHANNEL if by_channel else QuantizationStrategy.GROUP
    scheme = compressing.scheme(count, symmetric, strategy, group_size=group)
    shape = rows, group * groups
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    half = 1 << (count - 1)
    grid = rows, 1 if by_channel else groups
    zeros = torch.randint(-half + 1, half, grid, generator=generator, dtype=torch.int8)
    weight = QuantizedWeight(
        torch.randint(-half, half, shape, generator=generator, dtype=torch.int8),
        (torch.rand(grid, generator=generator) * 0.1 + 1e-4).half(),
        torch.zeros_like(zeros) if symmetric else zeros,
        scheme.weights,
    )
    return Layer("layer", shape, scheme), weight


def dense(layer: Layer, weight: QuantizedWeight) -> torch.Tensor:
    """In float64, where nothing is rounded."""
    scale, zero = (x.double().repeat_interleave(layer.group, 1) for x in (weight.scale, weight.zero_point))
    return (weight.values.double() - zero) * scale


@settings(deadline=None, max_examples=40)
@given(weights())
def test_awq_is_what_its_definition_says(given_weight):
    layer, weight = given_weight
    awq.check(layer)
    stored = awq.to_tensors(layer, weight)
    assert {k: t.dtype for k, t in stored.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
    }
    assert torch.equal(read_awq(stored), dense(layer, weight))
    assert awq.shape_of({k: t.shape for k, t in stored.items()}) == (*layer.shape, layer.groups, 4)
    assert torch.equal(awq.points(layer, stored), weight.values)
    scale, zero = awq.grid(layer, stored)
    assert torch.equal(scale, weight.scale)
    assert torch.equal(zero, weight.zero_point)


@settings(deadline=None, max_examples=60)
@given(weights(bits=(2, 3, 4, 8)), st.sampled_from(["gptq", "gptq_v2"]))
def test_gptq_is_what_its_definition_says(given_weight, version):
    layer, weight = given_weight
    gptq.check(layer)
    stored = gptq.to_tensors(layer, weight, version)
    bits = layer.args.num_bits
    assert torch.equal(read_gptq(stored, bits, version), dense(layer, weight))
    assert gptq.shape_of({k: t.shape for k, t in stored.items()}) == (*layer.shape, layer.groups, bits)
    assert torch.equal(gptq.points(layer, stored), weight.values)
    scale, zero = gptq.grid(layer, stored, version)
    assert torch.equal(scale, weight.scale)
    assert torch.equal(zero, weight.zero_point)


def compressed(path, dtype=torch.float16, build=tiny.llama, **options):
    """A checkpoint of ours, and its model."""
    model = build().to(dtype)
    bitpress.oneshot(model, None, compressing.rtn(**options), progress=False)
    model.save_pretrained(path)
    return model


def weight_of(path, layer):
    """By the definition of the format that the config states: float64."""
    stated = json.loads((path / "config.json").read_text())["quantization_config"]
    stored = load_file(path / "model.safetensors")
    own = {name.removeprefix(f"{layer}."): t for name, t in stored.items() if name.startswith(f"{layer}.")}
    if stated["quant_method"] == "awq":
        return read_awq(own)
    return read_gptq(own, stated["bits"], stated["checkpoint_format"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_there_and_back_is_byte_for_byte_the_same(tmp_path, dtype, symmetric, strategy):
    ours, back = tmp_path / "ours", tmp_path / "back"
    model = compressed(ours, dtype, symmetric=symmetric, strategy=QuantizationStrategy(strategy))
    bitpress.convert(ours, tmp_path / "awq", format="awq")
    bitpress.convert(tmp_path / "awq", tmp_path / "gptq", format="gptq")
    bitpress.convert(tmp_path / "gptq", back, format="compressed-tensors")
    for file in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (ours / file).read_bytes() == (back / file).read_bytes()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        exact = model.get_submodule(name).weight
        for kind in FOREIGN:
            assert torch.equal(weight_of(tmp_path / kind, name).to(dtype), exact)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_of_other_bits_comes_back(tmp_path, bits):
    ours, back = tmp_path / "ours", tmp_path / "back"
    model = compressed(ours, bits=bits, symmetric=bits == 8)
    bitpress.convert(ours, tmp_path / "gptq", format="gptq")
    bitpress.convert(tmp_path / "gptq", back, format="compressed-tensors")
    served = AutoModelForCausalLM.from_pretrained(back, dtype="auto")
    ids = torch.tensor(compressing.token_ids())
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(ours, dtype="auto")(ids).logits
        assert torch.equal(served(ids).logits, wanted)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(weight_of(tmp_path / "gptq", name).half(), model.get_submodule(name).weight)


def test_a_zero_point_of_0_makes_it_the_second_version(tmp_path):
    def positive():
        model = tiny.llama()
        model.model.layers[0].mlp.up_proj.weight.data.abs_()
        return model

    compressed(tmp_path / "ours")
    model = compressed(tmp_path / "positive", build=positive)
    for source, version in (("ours", "gptq"), ("positive", "gptq_v2")):
        bitpress.convert(tmp_path / source, tmp_path / f"{source}-gptq", format="gptq")
        stated = json.loads((tmp_path / f"{source}-gptq" / "config.json").read_text())["quantization_config"]
        assert stated["checkpoint_format"] == version
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(weight_of(tmp_path / "positive-gptq", name).half(), model.get_submodule(name).weight)


def test_rows_of_one_group_beside_rows_of_several(tmp_path):
    compressed(tmp_path / "ours", build=lambda: tiny.llama(intermediate_size=32))
    bitpress.convert(tmp_path / "ours", tmp_path / "awq", format="awq")
    bitpress.convert(tmp_path / "awq", tmp_path / "gptq", format="gptq")
    bitpress.convert(tmp_path / "gptq", tmp_path / "back", format="compressed-tensors")
    for kind in FOREIGN:
        stated = json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"]
        assert stated["group_size"] == 32
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


def test_dense_layers_within_blocks_are_named(tmp_path):
    compressed(tmp_path / "ours", ignore=("lm_head", "re:.*down_proj"))
    left = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    bitpress.convert(tmp_path / "ours", tmp_path / "awq", format="awq")
    bitpress.convert(tmp_path / "ours", tmp_path / "gptq", format="gptq")
    stated = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert sorted(stated["modules_to_not_convert"]) == ["lm_head", *left]
    stated = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert sorted(stated["dynamic"]) == [f"-:^{name}$".replace(".", r"\.") for name in left]
    assert not set(stated["modules_in_block_to_quantize"][0]) & set(left)


def test_rounded_scales_are_measured_and_said(tmp_path, caplog):
    model = compressed(tmp_path / "ours", torch.float32)
    with caplog.at_level(logging.WARNING, "bitpress"):
        bitpress.convert(tmp_path / "ours", tmp_path / "awq", format="awq")
    (said,) = [record.getMessage() for record in caplog.records if "float16" in record.getMessage()]
    names = [name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    off = []
    for name in names:
        exact = model.get_submodule(name).weight.double()
        off.append(((weight_of(tmp_path / "awq", name) - exact) / exact).abs().nan_to_num(0).max().item())
    assert max(off) < 2**-11 * 1.01
    assert f"{max(off):.2g} of their value" in said
    assert names[off.index(max(off))] in said


def test_scales_beyond_float16_are_refused(tmp_path):
    def tiny_weights():
        model = tiny.llama()
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1e-9)
        return model

    compressed(tmp_path / "ours", torch.bfloat16, build=tiny_weights)
    with pytest.raises(BitpressError, match=r"layers\.1\.mlp\.up_proj.*float16"):
        bitpress.convert(tmp_path / "ours", tmp_path / "awq", format="awq")
    assert not (tmp_path / "awq").exists()


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("awq", {"bits": 3}, "q_proj.*3-bit.*4 bits only"),
        ("gptq", {"bits": 5}, "5-bit.*2, 3, 4 or 8"),
        ("gguf", {"group_size": 16}, "group_size 32"),
        ("gguf", {"bits": 8}, "symmetric=True"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(tmp_path, kind, options, match):
    model = tiny.llama().half()
    with pytest.raises(BitpressError, match=match):
        bitpress.oneshot(
            model, None, compressing.rtn(**options), output_dir=tmp_path / "out", format=kind, progress=False
        )
    assert not any(hasattr(module, "quantization_scheme") for module in model.modules())
    assert not list(tmp_path.iterdir())


def test_two_schemes_are_refused(tmp_path):
    groups = {
        "a": compressing.scheme(4, targets=["re:.*self_attn.*"]),
        "b": compressing.scheme(4, targets=["re:.*mlp.*"], group_size=16),
    }
    model = tiny.llama().half()
    bitpress.oneshot(model, None, [bitpress.QuantizationModifier(config_groups=groups)], progress=False)
    with pytest.raises(BitpressError, match="one scheme for all layers"):
        model.save_pretrained(tmp_path / "out", format="awq")
    assert not list(tmp_path.iterdir())


def test_what_is_no_source_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(BitpressError, match="not compressed"):
        bitpress.convert(tmp_path / "dense", tmp_path / "out", format="awq")
    compressed(tmp_path / "ours")
    with pytest.raises(BitpressError, match="already"):
        bitpress.convert(tmp_path / "ours", tmp_path / "out", format="compressed-tensors")
    with pytest.raises(BitpressError, match="'marlin' is not known"):
        bitpress.convert(tmp_path / "ours", tmp_path / "out", format="marlin")
    with pytest.raises(BitpressError, match="holds a model already"):
        bitpress.convert(tmp_path / "ours", tmp_path / "dense", format="awq")


def test_columns_out_of_order_are_refused(tmp_path):
    compressed(tmp_path / "ours")
    bitpress.convert(tmp_path / "ours", tmp_path / "gptq", format="gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.0.mlp.up_proj.g_idx"] = stored["model.layers.0.mlp.up_proj.g_idx"].flip(0)
    from safetensors.torch import save_file

    save_file(stored, file)
    with pytest.raises(BitpressError, match=r"up_proj.*g_idx"):
        bitpress.convert(tmp_path / "gptq", tmp_path / "out", format="awq")


@pytest.mark.parametrize("kind", FOREIGN)
def test_all_ways_to_a_format_write_the_same(tmp_path, kind):
    tiny.llama().half().save_pretrained(tmp_path / "dense")
    options = {"progress": False, "format": kind}
    recipe = compressing.rtn()
    model = bitpress.oneshot(
        str(tmp_path / "dense"), None, recipe, output_dir=tmp_path / "whole", stream=False, **options
    )
    model.save_pretrained(tmp_path / "bound", format=kind)
    bitpress.save(model, tmp_path / "saved", format=kind)
    bitpress.oneshot(str(tmp_path / "dense"), None, recipe, output_dir=tmp_path / "streamed", stream=True, **options)
    model.save_pretrained(tmp_path / "ours")
    done = CliRunner().invoke(app, ["convert", f"{tmp_path}/ours", f"{tmp_path}/told", "--format", kind])
    assert done.exit_code == 0, done.output
    files = [(tmp_path / way / "model.safetensors").read_bytes() for way in ("whole", "bound", "saved", "told")]
    assert len({*files, (tmp_path / "streamed" / "model.safetensors").read_bytes()}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bound", "dense", "ours", "saved", "streamed", "told", "whole",
    ]  # fmt: skip


def test_several_shards(tmp_path):
    compressed(tmp_path / "ours")
    bitpress.convert(tmp_path / "ours", tmp_path / "awq", format="awq", max_shard_size="20KB")
    assert len(list((tmp_path / "awq").glob("*.safetensors"))) > 2
    bitpress.convert(tmp_path / "awq", tmp_path / "back", format="compressed-tensors")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    compressed(tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_type": "of-tomorrow", "architectures": ["OfTomorrow"]}))
    bitpress.convert(tmp_path / "ours", tmp_path / "awq", format="awq")
    bitpress.convert(tmp_path / "awq", tmp_path / "back", format="compressed-tensors")
    stated = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert stated["ignore"] == ["lm_head"]
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "back" / "model.safetensors"
    ).read_bytes()
