"""Packed models: what they hold, what they compute, and that they are models like others."""

import copy
import logging
import weakref

import pytest
import tiny
import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressing import rtn, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import bitpress
from bitpress import BitpressError, QuantizationModifier, oneshot
from bitpress.modifiers.quantization import PRESETS
from bitpress.quantization import QuantizationStrategy
from bitpress.runtime import pack, unpack
from bitpress.runtime.int4 import Int4Layer
from bitpress.runtime.layers import PackedLayer

GROUP = QuantizationStrategy.GROUP


def packed_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Wide enough for the presets' groups of 128, on the disk: a cast model has other rotary embeddings."""
    folder = tmp_path_factory.mktemp("source")
    tiny.llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1).save_pretrained(folder)
    return lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def compressed(source, dtype=torch.bfloat16, recipe=None):
    return oneshot(source(dtype), None, recipe or rtn())


# What is computed.


@pytest.mark.parametrize("preset", [*PRESETS])
def test_every_preset_computes_what_the_dense_model_does(preset, source):
    calibrated = {"num_calibration_samples": 2}
    model = source(torch.bfloat16)
    oneshot(model, token_ids(2), QuantizationModifier(scheme=preset, ignore=["lm_head"]), **calibrated)
    before = tiny.logits(model)
    assert torch.equal(tiny.logits(pack(model, exact=True)), before)
    assert len(packed_layers(model)) == 7
    assert torch.equal(tiny.logits(unpack(model)), before)
    # Changed by a kernel, or not at all; what a kernel rounds otherwise may move an activation to the next point.
    activations = "input_activations" in PRESET_SCHEMES[preset]
    assert (tiny.logits(pack(model)) - before).norm() <= (0.3 if activations else 0.03) * before.norm()


@pytest.mark.parametrize("strategy", list(QuantizationStrategy)[:3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_grid_in_float32_is_exact(bits, symmetric, strategy):
    recipe = rtn(ignore=(), bits=bits, symmetric=symmetric, strategy=strategy)
    model = oneshot(tiny.MLP(32, 64, 32), None, recipe)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    before = model(x)
    assert torch.equal(pack(model)(x), before)


@pytest.mark.parametrize("family", ["gpt2", "bert", "falcon_new", "opt"])
def test_families(family):
    recipe = rtn(targets=["Conv1D" if family == "gpt2" else "Linear"])
    model = oneshot(getattr(tiny, family)(), None, recipe)
    before = tiny.logits(model)
    assert torch.equal(tiny.logits(pack(model)), before)
    assert packed_layers(model)
    assert torch.equal(tiny.logits(unpack(model)), before)


def test_conv1d_on_a_kernel(tmp_path):
    model = oneshot(tiny.gpt2().bfloat16(), None, rtn(targets=["Conv1D"]))
    before = tiny.logits(model)
    pack(model)
    assert all(isinstance(layer, Int4Layer) for layer in packed_layers(model).values())
    assert (tiny.logits(model) - before).norm() <= 0.03 * before.norm()


def test_float32_models_run_in_bfloat16_if_asked(source):
    model = compressed(source, torch.float32)
    before = tiny.logits(model)
    pack(model, compute_dtype=torch.bfloat16)
    assert all(isinstance(layer, Int4Layer) for layer in packed_layers(model).values())
    after = tiny.logits(model)
    assert after.dtype == torch.float32
    assert 0 < (after - before).norm() <= 0.03 * before.norm()


# What is held.


def held_bytes(model, names):
    layers = [model.get_submodule(name) for name in names]
    return sum(t.nbytes for layer in layers for t in layer.state_dict().values())


def test_nothing_dense_is_left(source):
    model = compressed(source, recipe=rtn(group_size=64))
    names = [name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    dense, weights = held_bytes(model, names), [weakref.ref(model.get_submodule(n).weight) for n in names]
    pack(model)
    assert not any(ref() is not None for ref in weights)
    assert held_bytes(model, names) == (4 + 32 / 64) / 16 * dense
    tiny.logits(model)
    assert held_bytes(model, names) == (4 + 32 / 64) / 16 * dense


def test_state_dicts_hold_the_weights():
    first, second = (pack(oneshot(tiny.MLP(64, 64), None, rtn(ignore=()))) for _ in range(2))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_unpacked_models_are_as_they_were(source):
    model = compressed(source)
    before = tiny.snapshot(model)
    kinds = [type(module) for module in model.modules()]
    unpack(pack(model))
    tiny.assert_unchanged(model, before)
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._non_persistent_buffers_set - module._buffers.keys() for module in model.modules())


# Packed models are models like others.


def test_packing_twice_changes_nothing(source):
    model = pack(compressed(source))
    kinds, before = {n: type(m) for n, m in packed_layers(model).items()}, tiny.logits(model)
    pack(model)
    assert {n: type(m) for n, m in packed_layers(model).items()} == kinds
    assert torch.equal(tiny.logits(model), before)


def test_copies(source):
    model = pack(compressed(source))
    other = copy.deepcopy(model)
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    unpack(model)
    assert packed_layers(other)
    assert tiny.logits(other).isfinite().all()


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_casting_is_that_of_the_dense_weights(dtype, to):
    model = oneshot(tiny.MLP(64, 64, 64).to(dtype), None, rtn(ignore=()))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(to)
    exact, fast = (pack(copy.deepcopy(model), exact=exact).to(to) for exact in (True, False))
    expected = model.to(to)(x)
    assert torch.equal(exact(x), expected)
    assert all(isinstance(m, Int4Layer) == (to == torch.bfloat16) for m in packed_layers(fast).values())
    assert (fast(x) - expected).norm() <= 0.03 * expected.norm()
    weights = [m.weight for m in fast.net if hasattr(m, "weight")]
    assert all(torch.equal(m, n.weight) for m, n in zip(weights, model.net[::2], strict=True))


def test_moving_keeps_the_weights():
    model = pack(oneshot(tiny.MLP(64, 64).bfloat16(), None, rtn(ignore=())))
    layer = model.net[0]
    assert layer.weight_int4.untyped_storage().data_ptr() == model.to("cpu").net[0].weight_int4.data_ptr()
    assert model.to("meta").net[0].weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [rtn(ignore=()), QuantizationModifier(scheme="FP8", targets=["Linear"])])
def test_compiled(recipe, dtype):
    data = torch.randn(4, 128).to(dtype)
    model = oneshot(tiny.MLP(128, 128, 128).to(dtype), data, recipe, num_calibration_samples=4)
    pack(model)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_hooks_see_what_they_saw():
    model = oneshot(tiny.MLP(64, 64).bfloat16(), None, rtn(ignore=()))
    seen = []
    model.net[0].register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
    pack(model)(torch.zeros(3, 64).bfloat16())
    assert seen == [((3, 64), (3, 64))]


# Saving.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["W4A16_ASYM", "W8A16", "W8A8", "FP8", "NVFP4A16"])
def test_saved_as_the_dense_model(preset, dtype, source, tmp_path):
    model = source(dtype)
    recipe = QuantizationModifier(scheme=preset, ignore=["lm_head"])
    oneshot(model, token_ids(2), recipe, num_calibration_samples=2)
    model.save_pretrained(tmp_path / "dense")
    pack(model).save_pretrained(tmp_path / "packed")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "dense" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes()


@pytest.mark.parametrize("family", ["gpt2", "mlp"])
@pytest.mark.parametrize("save_compressed", [True, False])
def test_saved_where_some_are_dense(family, save_compressed, tmp_path):
    model = tiny.MLP(64, 3) if family == "mlp" else tiny.gpt2()
    oneshot(model, None, rtn(ignore=(), targets=["Linear" if family == "mlp" else "Conv1D"]))
    bitpress.save(model, tmp_path / "dense", save_compressed=save_compressed)
    bitpress.save(pack(model), tmp_path / "packed", save_compressed=save_compressed)
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dense", "packed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_cast_model_is_not_saved_as_what_it_was(source, tmp_path):
    model = pack(compressed(source, torch.float32)).to(torch.bfloat16)
    with pytest.raises(BitpressError, match="trained, cast or replaced"):
        bitpress.save(model, tmp_path / "out")


# What stays dense, and what is refused.


def test_shared_weights_stay_dense(caplog):
    model = tiny.MLP(64, 64, 64)
    oneshot(model, None, rtn(ignore=()))
    model.net[2].weight = model.net[0].weight
    with caplog.at_level(logging.WARNING):
        pack(model)
    assert not packed_layers(model)
    assert "net.0 first) stay dense, because other modules share" in caplog.text


class Reads(nn.Module):
    """Uses the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.outer = nn.Linear(64, 64)

    def forward(self, x):
        return self.outer(x @ self.inner.weight.T)


def test_weights_that_the_model_reads_itself_stay_dense(caplog):
    model = oneshot(Reads(), None, rtn(ignore=()))
    with caplog.at_level(logging.WARNING):
        pack(model)
    assert list(packed_layers(model)) == ["outer"]
    assert "the model's own code uses their weights" in caplog.text


def test_fused_experts_stay_dense(caplog):
    config = Qwen3MoeConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = oneshot(tiny.seeded(lambda: Qwen3MoeForCausalLM(config)), None, rtn())
    before = tiny.logits(model)
    with caplog.at_level(logging.WARNING):
        pack(model)
    assert packed_layers(model)
    assert "parts of a parameter of all experts" in caplog.text
    assert torch.equal(tiny.logits(model), before)


def test_a_model_that_is_not_quantized():
    with pytest.raises(BitpressError, match="no layer of the model is quantized"):
        pack(tiny.MLP(64, 64))


@pytest.mark.parametrize(
    "options", [{"compute_dtype": torch.float16}, {"compute_dtype": torch.bfloat16, "exact": True}], ids=str
)
def test_arguments_of_no_use(options, source):
    with pytest.raises(BitpressError, match=r"kernels compute in torch\.bfloat16"):
        pack(compressed(source), **options)


def test_a_changed_weight_is_found_before_anything_is_packed():
    model = oneshot(tiny.MLP(64, 64, 64), None, rtn(ignore=()))
    with torch.no_grad():
        model.net[2].weight += 1
    with pytest.raises(BitpressError, match=r"net\.2\.weight is not what oneshot left"):
        pack(model)
    assert not packed_layers(model)
