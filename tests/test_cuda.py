"""On a CUDA device: what it finds is what the CPU finds, within the rounding of sums; one block is there at a time."""

import pytest
import torch
from safetensors.torch import load_file
from test_streaming import four_bits, report, stored, tokens
from tiny import llama

import bitpress
from bitpress import (
    AWQModifier,
    DistillationModifier,
    GPTQModifier,
    QuantizationModifier,
    SmoothQuantModifier,
    oneshot,
)
from bitpress.pipelines import spilling
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.runtime import pack
from bitpress.runtime.int4 import Int4Layer
from bitpress.statistics import InputStatistics, Statistic

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RECIPES = {
    "awq": lambda: [AWQModifier(), QuantizationModifier(**four_bits(), ignore=["lm_head"])],
    "gptq": lambda: [GPTQModifier(**four_bits(), ignore=["lm_head"])],
    "awq+gptq": lambda: [AWQModifier(), GPTQModifier(**four_bits(), ignore=["lm_head"])],
    "drift": lambda: [GPTQModifier(**four_bits(), ignore=["lm_head"], error_correction=0.5)],
    "w8a8": lambda: [SmoothQuantModifier(), GPTQModifier(scheme="W8A8", ignore=["lm_head"])],
    "distilled": lambda: [GPTQModifier(**four_bits(), ignore=["lm_head"]), DistillationModifier(epochs=1)],
    "nvfp4": lambda: [QuantizationModifier(scheme="NVFP4", ignore=["lm_head"])],
}


def weights(path):
    model = bitpress.load(path, packed=False)
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}


def assert_close(one, other):
    """Nearly all weights are the same; where a sum is rounded otherwise one may fall to the next point of the grid."""
    for name, weight in one.items():
        differs = (weight - other[name]).norm() / weight.norm().clamp(min=1e-30)
        assert differs < 0.05, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_and_loaded_models_are_those_of_the_cpu(recipe, dtype, tmp_path):
    source = stored(llama(), tmp_path / "model", dtype)
    found = {}
    for name, options in {
        "cpu": {"device": "cpu"},
        "streamed": {"device": "cuda"},
        "loaded": {"device": "cuda", "stream": False},
        "disk": {"activations": "disk"},
    }.items():
        out = tmp_path / name
        bitpress.oneshot(source, tokens(), RECIPES[recipe](), output_dir=out, progress=False, **options)
        found[name] = weights(out)
    for name in ("streamed", "loaded", "disk"):
        assert_close(found["cpu"], found[name])


def test_activations_on_the_host_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(spilling, "LEAST_BYTES", 1)
    source = stored(llama(), tmp_path / "model")
    found = {}
    for place in ("device", "host", "disk"):
        if place == "host":
            monkeypatch.setattr(
                spilling, "free_memory", lambda device: 1 if torch.device(device).type == "cuda" else 1 << 40
            )
        where = {"activations": "disk"} if place == "disk" else {}
        bitpress.oneshot(source, tokens(), RECIPES["gptq"](), output_dir=tmp_path / place, progress=False, **where)
        found[place] = load_file(tmp_path / place / "model.safetensors")
    for place in ("host", "disk"):
        assert all(torch.equal(found[place][name], tensor) for name, tensor in found["device"].items())


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    source, out = stored(llama(), tmp_path / "model"), tmp_path / "out"
    bitpress.oneshot(source, tokens(), RECIPES["gptq"](), output_dir=tmp_path / "whole", progress=False)
    solved = GPTQModifier.on_solved

    def interrupt(self, state, block):
        solved(self, state, block)
        if block.name.endswith(".1"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GPTQModifier, "on_solved", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bitpress.oneshot(source, tokens(), RECIPES["gptq"](), output_dir=out, progress=False)
    bitpress.oneshot(source, tokens(), RECIPES["gptq"](), output_dir=out, progress=False)
    whole, resumed = (load_file(p / "model.safetensors") for p in (tmp_path / "whole", out))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert report(out)["layers"] == report(tmp_path / "whole")["layers"]


def test_the_device_holds_a_few_blocks_at_most(tmp_path):
    model = llama(num_hidden_layers=8)
    source = stored(model, tmp_path / "model")
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bitpress.oneshot(
        source, tokens(rows=1, length=4), QuantizationModifier(**four_bits()), output_dir=tmp_path / "out",
        pipeline="sequential", progress=False,
    )  # fmt: skip
    assert torch.cuda.max_memory_allocated() - before < whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_of_halves_is_as_good_as_float32(dtype):
    x = torch.randn(4096, 3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistics = InputStatistics(3000, Statistic.GRAM, "cuda")
    for part in x.cuda().split(512):
        statistics.update(part)
    exact = x.double().T @ x.double()
    bound = 2**-23 * 4096 * (x.double().abs().T @ x.double().abs())
    assert ((statistics.gram.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_packed_weights_compute_on_the_gpu(symmetric, group, tmp_path):
    weights = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = torch.nn.Sequential(torch.nn.Linear(256, 80), torch.nn.ReLU(), torch.nn.Linear(80, 48)).bfloat16()
    oneshot(model, None, QuantizationModifier(config_groups={"group_0": scheme}, ignore=["2"]))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, weight = model(x), model[0].weight.clone()
    pack(model)
    moved = model.to("cuda")
    assert isinstance(moved[0], Int4Layer)
    assert torch.equal(moved[0].weight.cpu(), weight)
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(moved.to("cpu")[0].weight, weight)
