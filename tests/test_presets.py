"""Every preset of compressed-tensors, from oneshot to the model that is loaded back."""

import logging
from importlib.metadata import version

import pytest
import tiny
import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressing import token_ids
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import bitpress
from bitpress import oneshot
from bitpress.modifiers import AWQModifier, GPTQModifier, QuantizationModifier
from bitpress.modifiers.quantization import PRESETS
from bitpress.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from bitpress.quantization.scales import ScaleKind, scale_kind

WEIGHT_ONLY = [name for name in PRESETS if "input_activations" not in PRESET_SCHEMES[name]]
# The weights of those with activations; their own are tested elsewhere.
OF_WEIGHTS = ["W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"]
# The reader of compressed-tensors 0.17 and 0.18 guesses the size of blocks from the number of scales.
GUESSES_BLOCKS = Version(version("compressed-tensors")) < Version("0.19")
KNOWN_BLOCKS = pytest.mark.skipif(GUESSES_BLOCKS, reason="compressed-tensors before 0.19 misreads these blocks")
# What is stored for a layer, by preset; of all others weight_packed, weight_scale and weight_shape.
KINDS = {
    **{name: {"weight", "weight_scale"} for name in ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8A16")},
    **{name: {"weight_packed", "weight_scale"} for name in ("MXFP4A16", "MXFP6A16")},
    "NVFP4A16": {"weight_packed", "weight_scale", "weight_global_scale"},
    "W4A16_ASYM": {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"},
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def weights_of(preset):
    """The preset's scheme, without its activations."""
    return preset_name_to_scheme(preset, ["Linear"]).model_copy(update={"input_activations": None})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Widths that groups of 128 divide, and that blocks of 128 do not."""
    folder = tmp_path_factory.mktemp("source")
    tiny.llama(hidden_size=128, intermediate_size=384, num_hidden_layers=1).save_pretrained(folder)
    return folder


def model_of(source, dtype):
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)


def same_logits(a, b):
    x, y = tiny.logits(a), tiny.logits(b)
    return x.dtype == y.dtype and torch.equal(x, y)


def read_as_bfloat16(preset):
    return scale_kind(weights_of(preset).weights) != ScaleKind.PLAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", [*WEIGHT_ONLY, *OF_WEIGHTS])
def test_what_was_evaluated_is_what_is_loaded(preset, dtype, source, tmp_path, caplog):
    model = model_of(source, dtype)
    before = tiny.logits(model)
    scheme = preset if preset in WEIGHT_ONLY else weights_of(preset)
    oneshot(model, None, QuantizationModifier(scheme=scheme, ignore=["lm_head"]))
    assert not torch.equal(tiny.logits(model), before)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {n.removeprefix(f"{Q_PROJ}.") for n in stored if n.startswith(f"{Q_PROJ}.")}
    assert kinds == KINDS.get(preset, {"weight_packed", "weight_scale", "weight_shape"})
    assert same_logits(bitpress.load(tmp_path / "out", packed=False), model)
    if dtype == torch.float32 and read_as_bfloat16(preset):
        assert "load it with dtype=torch.bfloat16" in caplog.text
        return
    assert "bfloat16" not in caplog.text
    if preset == "FP8_BLOCK" and GUESSES_BLOCKS:  # one block wide
        assert "load the checkpoint with compressed-tensors 0.19 or later" in caplog.text
        return
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype), model)


@pytest.mark.parametrize("preset", ["MXFP4A16", "MXFP8A16", "NVFP4A16"])
def test_small_floats_of_a_float32_model_load_as_bfloat16(preset, source, tmp_path):
    model = oneshot(model_of(source, torch.float32), None, QuantizationModifier(scheme=preset, ignore=["lm_head"]))
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    tiny.logits(loaded)  # unpacks it
    for name, layer in model.named_modules():
        if hasattr(layer, "quantization_scheme"):
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight.bfloat16())


@pytest.mark.parametrize(
    "preset", ["W8A8", "FP8", pytest.param("FP8_BLOCK", marks=KNOWN_BLOCKS), "NVFP4A16", "MXFP4A16", "MXFP8A16"]
)
def test_awq_in_front(preset, source, tmp_path):
    model = model_of(source, torch.bfloat16)
    recipe = [AWQModifier(), QuantizationModifier(scheme=weights_of(preset), ignore=["lm_head"])]
    oneshot(model, token_ids(), recipe, num_calibration_samples=6)
    assert model.bitpress.report["mappings"]
    model.save_pretrained(tmp_path / "out")
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16), model)


def test_formats_side_by_side(source, tmp_path):
    parts = {
        "NVFP4A16": "q_proj|k_proj",
        "FP8_DYNAMIC": "v_proj|o_proj",
        "MXFP4A16": "gate_proj|up_proj",
        "W4A16": "down_proj",
    }
    groups = {n: weights_of(n).model_copy(update={"targets": [f"re:.*({of})$"]}) for n, of in parts.items()}
    model = oneshot(model_of(source, torch.bfloat16), None, QuantizationModifier(config_groups=groups, fused=False))
    model.save_pretrained(tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config
    assert config.quantization_config.format == "mixed-precision"
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    assert same_logits(bitpress.load(tmp_path / "out", packed=False), model)


@KNOWN_BLOCKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_do_not_divide(dtype, source, tmp_path, caplog):
    weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[48, 80])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = oneshot(model_of(source, dtype), None, QuantizationModifier(scheme=scheme, ignore=["lm_head"]))
    assert "blocks of 80 columns do not divide the 128 inputs of model.layers.0.self_attn.q_proj" in caplog.text
    assert model.get_submodule(Q_PROJ).weight_scale.shape == (3, 2)
    model.save_pretrained(tmp_path / "out")
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype), model)
    assert same_logits(bitpress.load(tmp_path / "out", packed=False), model)


@pytest.mark.parametrize(
    "preset", ["FP8_DYNAMIC", pytest.param("FP8_BLOCK", marks=KNOWN_BLOCKS), "NVFP4A16", "MXFP4A16"]
)
def test_gptq(preset, source, tmp_path):
    model = model_of(source, torch.bfloat16)
    oneshot(model, token_ids(), GPTQModifier(scheme=weights_of(preset), ignore=["lm_head"]), num_calibration_samples=6)
    model.save_pretrained(tmp_path / "out")
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16), model)


@pytest.mark.parametrize(
    "preset", [p for p in ("FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16") if p in PRESETS]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_modules(preset, dtype, tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 5)).to(dtype)

    model = oneshot(network(), None, QuantizationModifier(scheme=weights_of(preset)))
    bitpress.save(model, tmp_path / "out")
    loaded = bitpress.load(tmp_path / "out", network(), packed=False)
    x = torch.randn(7, 96).to(dtype)
    assert torch.equal(loaded(x), model(x))
    bitpress.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("with_awq", [True, False], ids=["awq", "alone"])
def test_layers_that_servers_fuse_share_their_global_scale(with_awq, source):
    model = model_of(source, torch.bfloat16)
    recipe = [*([AWQModifier()] if with_awq else []), QuantizationModifier(scheme="NVFP4A16", ignore=["lm_head"])]
    oneshot(model, token_ids() if with_awq else None, recipe, num_calibration_samples=6)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, gate, up, down = (
        float(m.weight_global_scale)
        for m in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
    assert q == k == v
    assert gate == up
    assert down != up
    assert q != up
