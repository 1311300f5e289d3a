"""Models that are loaded packed: those that are loaded dense and packed then, with nothing unpacked on the way."""

import pytest
import tiny
import torch
from compressing import rtn, token_ids
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import bitpress
from bitpress import BitpressError, QuantizationModifier, oneshot
from bitpress.quantization import QuantizationArgs, QuantizedWeight
from bitpress.runtime import pack
from bitpress.runtime.int4 import Int4Layer
from bitpress.runtime.layers import PackedLayer


def packed_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}


def never(*_, **__):
    raise AssertionError("a weight was unpacked")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def folder(request, tmp_path):
    tiny.llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=request.param)
    oneshot(model, None, rtn())
    model.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_as_if_packed_afterwards(folder):
    model = bitpress.load(folder)
    expected = pack(bitpress.load(folder, packed=False))
    assert packed_layers(model).keys() == packed_layers(expected).keys()
    tiny.assert_unchanged(model, tiny.snapshot(expected))
    assert torch.equal(tiny.logits(model), tiny.logits(expected))
    assert torch.equal(tiny.logits(bitpress.load(folder, exact=True)), tiny.logits(bitpress.load(folder, packed=False)))


def test_nothing_is_unpacked(folder, monkeypatch):
    monkeypatch.setattr(QuantizedWeight, "dequantize", never)
    model = bitpress.load(folder)
    assert len(packed_layers(model)) == 14
    held = sum(t.untyped_storage().nbytes() for layer in packed_layers(model).values() for t in layer.buffers())
    dense = sum(layer.weight_shape[0] * layer.weight_shape[1] for layer in packed_layers(model).values())
    assert held < dense  # bytes: a byte a weight is half of bfloat16


def test_cast_while_loading(folder):
    model = bitpress.load(folder, dtype=torch.bfloat16)
    dense = bitpress.load(folder, packed=False, dtype=torch.bfloat16)
    assert all(isinstance(layer, Int4Layer) for layer in packed_layers(model).values())
    assert all(torch.equal(layer.weight, dense.get_submodule(n).weight) for n, layer in packed_layers(model).items())


def test_saved_again(folder, tmp_path):
    bitpress.save(bitpress.load(folder), tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_into_a_module(device, tmp_path, monkeypatch):
    model = oneshot(tiny.MLP(64, 96, 64), None, rtn(ignore=()))
    bitpress.save(model, tmp_path / "out")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    with torch.device(device):
        fresh = tiny.MLP(64, 96, 64)
    with monkeypatch.context() as patched:
        patched.setattr(QuantizedWeight, "dequantize", never)
        assert bitpress.load(tmp_path / "out", fresh) is fresh
    assert len(packed_layers(fresh)) == 2
    assert torch.equal(fresh(x), expected)


def test_dense_into_a_module_on_the_meta_device(tmp_path):
    model = oneshot(tiny.MLP(64, 96, 64), None, rtn(ignore=()))
    bitpress.save(model, tmp_path / "out")
    with torch.device("meta"):
        fresh = tiny.MLP(64, 96, 64)
    bitpress.load(tmp_path / "out", fresh, packed=False)
    tiny.assert_unchanged(fresh, tiny.snapshot(model))


def test_gpt2(tmp_path):
    model = oneshot(tiny.gpt2(), None, rtn(targets=["Conv1D"]))
    model.save_pretrained(tmp_path / "out")
    # Stored dense: readers take no packed Conv1D.
    assert torch.equal(tiny.logits(bitpress.load(tmp_path / "out")), tiny.logits(model))


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC", "W4AFP8", "NVFP4"])
def test_activations_and_cache(preset, tmp_path):
    tiny.llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    recipe = QuantizationModifier(scheme=preset, ignore=["lm_head"], kv_cache_scheme=QuantizationArgs(num_bits=8))
    oneshot(model, token_ids(2), recipe, num_calibration_samples=2)
    model.save_pretrained(tmp_path / "out")
    back = bitpress.load(tmp_path / "out", exact=True)
    assert len(packed_layers(back)) == 14
    tokens = tiny.tokens(2, 8)
    generated = [m.generate(**tokens, max_new_tokens=5, do_sample=False) for m in (model, back)]
    assert torch.equal(*generated)
    assert torch.equal(tiny.logits(back), tiny.logits(model))


def test_experts(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = oneshot(tiny.seeded(lambda: Qwen3MoeForCausalLM(config)), None, rtn())
    model.save_pretrained(tmp_path / "out")
    back = bitpress.load(tmp_path / "out")
    assert packed_layers(back)
    assert torch.equal(tiny.logits(back), tiny.logits(model))


def test_arguments_are_checked_first(tmp_path):
    with pytest.raises(BitpressError, match="kernels compute in"):
        bitpress.load(tmp_path / "nowhere", compute_dtype=torch.float16)
