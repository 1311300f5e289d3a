"""AWQ and GPTQ checkpoints in transformers, whose quantizer for both is GPTQModel: needs gptqmodel and optimum."""

import compressing
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import bitpress

pytestmark = pytest.mark.serving
gptqmodel = pytest.importorskip("gptqmodel")

# Groups that its kernels for the CPU take, and heads and gates that fill words.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def quantized(bits, symmetric, **options):
    model = tiny.llama(**WIDE).half()
    bitpress.oneshot(model, None, compressing.rtn(bits=bits, symmetric=symmetric, **options), progress=False)
    return model


def positive(model):
    model.model.layers[0].mlp.up_proj.weight.data.abs_()
    return model


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric"),
    [("awq", 4, False), ("awq", 4, True), ("gptq", 4, False), ("gptq", 4, True), ("gptq", 8, True), ("gptq", 2, False)],
)
def test_weights_are_the_same_and_logits_are_near(tmp_path, kind, bits, symmetric):
    model = quantized(bits, symmetric)
    model.save_pretrained(tmp_path / "out", format=kind)
    check(model, tmp_path / "out")


def test_zero_points_of_0(tmp_path):
    model = positive(tiny.llama(**WIDE).half())
    bitpress.oneshot(model, None, compressing.rtn(), progress=False)
    model.save_pretrained(tmp_path / "out", format="gptq")
    check(model, tmp_path / "out")


def test_dense_layers_within_blocks(tmp_path):
    model = quantized(4, True, ignore=("lm_head", "re:.*down_proj"))
    model.save_pretrained(tmp_path / "out", format="gptq")
    served = check(model, tmp_path / "out")
    assert isinstance(served.model.layers[1].mlp.down_proj, torch.nn.Linear)


def check(model, path):
    """The weights that the program has unpacked are ours; its kernels for activations add up in another order."""
    served = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="cpu").eval()
    ids = torch.tensor(compressing.token_ids())
    count = 0
    with torch.no_grad():
        # Before the first forward, which repacks them.
        for name, layer in served.named_modules():
            if hasattr(layer, "qweight") and hasattr(layer, "dequantize_weight"):
                weight = layer.dequantize_weight().T
                assert torch.equal(weight.to(torch.float16), model.get_submodule(name).weight), name
                count += 1
        wanted, logits = model(ids).logits, served(ids).logits
    assert (logits - wanted).abs().max() < 0.01 * wanted.abs().max()
    assert (logits.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.98
    if served.config.quantization_config.quant_method == "gptq":
        assert count
    return served
