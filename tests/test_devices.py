"""On a simulated device (see simulated.py): no tensors of two devices meet, and the checkpoint is the CPU's to the bit.

Each test runs in one other process, which keeps the device.
"""

import copy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import simulated
import torch
from architectures import ARCHITECTURES
from compressing import sentences, tokenizer
from test_streaming import TIMED, files, report, stored
from tiny import MLP, llama
from torch.nn.attention import SDPBackend, sdpa_kernel

import bitpress
from bitpress import AWQModifier, DistillationModifier, GPTQModifier, QuantizationModifier, SmoothQuantModifier
from bitpress.pipelines import spilling
from bitpress.pipelines.spilling import LEAST_BYTES, Spill
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.session.devices import find_device

pytestmark = pytest.mark.skipif(simulated.missing() is not None, reason=str(simulated.missing()))

INT8 = QuantizationArgs(num_bits=8, type="int")
FP8 = QuantizationArgs(num_bits=8, type="float")
PER_HEAD = QuantizationArgs(num_bits=8, type="int", strategy="attn_head")


def weights(bits=4, size=16, **more):
    own = {"symmetric": False, "strategy": "group", "group_size": size, **more}
    return QuantizationArgs(num_bits=bits, **own)


def scheme(*, inputs=None, outputs=None, **more):
    fields = {"weights": weights(**more), "input_activations": inputs, "output_activations": outputs}
    return QuantizationScheme(targets=["Linear"], **fields)


def groups(**fields):
    return {"config_groups": {"all": scheme(**fields)}}


def blocks(**more):
    of_weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[16, 16], **more)
    return QuantizationScheme(targets=["Linear"], weights=of_weights)


def plain(**fields):
    return [QuantizationModifier(**{"ignore": ["lm_head"], **fields})]


def gptq(**fields):
    return [GPTQModifier(**{"ignore": ["lm_head"], **fields})]


def awq():
    return AWQModifier(n_grid=3, duo_scaling="both")


STREAMED = {
    "awq, gptq, correction": lambda: [awq(), *gptq(**groups(), error_correction=0.5)],
    "awq, FP8": lambda: [awq(), *plain(scheme="FP8_DYNAMIC")],
    "awq, blocks": lambda: [awq(), *plain(scheme=blocks())],
    "gptq by activity": lambda: gptq(**groups(actorder="static")),
    "gptq per channel": lambda: gptq(**groups(strategy="channel", group_size=None, observer="mse")),
    "refined": lambda: gptq(**groups(observer="gram"), refine=1),
    "refined blocks": lambda: gptq(scheme=blocks(observer="gram"), refine=0),
    "all of the head": lambda: gptq(**groups(inputs=INT8, outputs=INT8), refine=0, ignore=[]),
    "smoothed": lambda: [SmoothQuantModifier(), *gptq(scheme="W8A8")],
    "smoothed by search": lambda: [
        SmoothQuantModifier(smoothing_strength="search", mappings=[["re:.*v_proj", "re:.*o_proj"]]),
        *plain(scheme="W8A8"),
    ],
    "cache": lambda: plain(**groups(), kv_cache_scheme=FP8),
    "cache per head": lambda: plain(**groups(), kv_cache_scheme=PER_HEAD),
    "NVFP4": lambda: [awq(), *gptq(scheme="NVFP4")],
    "MXFP4": lambda: gptq(scheme="MXFP4"),
    "MXFP6": lambda: gptq(scheme="MXFP6A16"),
    "FP8": lambda: gptq(scheme="FP8"),
    "observer imatrix": lambda: plain(**groups(observer="imatrix_mse")),
    "observer gram per tensor": lambda: plain(**groups(strategy="tensor", group_size=None, observer="gram")),
}

LOADED = {
    "awq, static activations": lambda: [awq(), *plain(**groups(inputs=INT8, outputs=FP8))],
    "distilled": lambda: [*gptq(**groups()), DistillationModifier(epochs=1)],
    "chosen": lambda: plain(choose_from=[scheme(bits=bits) for bits in (3, 4)], bits_per_weight=3.5),
}

MODELS = {
    "bert": lambda: [awq(), *plain(**groups())],
    "gemma3": lambda: [awq(), *plain(**groups())],
    "gpt_oss": lambda: gptq(**groups()),
    "mixtral": lambda: gptq(**groups(), error_correction=0.5),
    "qwen3_moe": lambda: [awq(), *plain(**groups())],
}


def data():
    """Sequences of two lengths, so that some are padded."""
    ids = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(3)).tolist()
    return [row[: 16 - 4 * (i % 2)] for i, row in enumerate(ids)]


def oneshot(source, recipe, samples, path, device, **options):
    # Attention as products of matrices, which is how torch does it on a device that it does not know.
    with sdpa_kernel(SDPBackend.MATH):
        bitpress.oneshot(source, samples, recipe, output_dir=path, device=str(device), progress=False, **options)
    return path


def assert_same(one, other):
    assert files(one, *TIMED) == files(other, *TIMED)
    assert report(one)["layers"] == report(other)["layers"]


def same(source, recipe, samples, path, **options):
    """What the device finds is what the CPU does."""
    cpu = oneshot(source, recipe, samples, path / "cpu", "cpu", **options)
    assert_same(oneshot(source, recipe, samples, path / "device", simulated.make(), **options), cpu)


def small_llama(path, dtype=None):
    return stored(llama(hidden_size=32, intermediate_size=32), path / "model", dtype)


def recipe_is_same(name, path, recipes, stream):
    dtype = torch.bfloat16 if name.startswith(("NVFP4", "MX")) else None
    same(small_llama(path, dtype), recipes[name](), data(), path, batch_size=2, stream=stream)


def streamed_is_same(name, path):
    recipe_is_same(name, path, STREAMED, True)


def loaded_is_same(name, path):
    recipe_is_same(name, path, LOADED, False)


def model_is_same(name, path):
    architecture = ARCHITECTURES[name]
    samples = [architecture.inputs(1, 16, seed) for seed in range(2)]
    same(stored(architecture.build(), path / "model"), MODELS[name](), samples, path, stream=True)


def activations_elsewhere_change_nothing(place, path):
    """The device has room for none of them, or none are to be in memory."""
    emptied = []
    out, free = Spill.out, spilling.free_memory

    def watched(self, index, storages):
        emptied.extend(storage.device.type for storage in storages)
        out(self, index, storages)

    source, options = small_llama(path), {"activations": "disk"} if place == "disk" else {}
    cpu = oneshot(source, gptq(**groups(), error_correction=0.5), data(), path / "cpu", "cpu")
    try:
        spilling.LEAST_BYTES, Spill.out = 1, watched
        spilling.free_memory = lambda at: 1 if at.type == simulated.NAME else free(at)
        recipe = gptq(**groups(), error_correction=0.5)
        found = oneshot(source, recipe, data(), path / "device", simulated.make(), **options)
    finally:
        spilling.LEAST_BYTES, Spill.out, spilling.free_memory = LEAST_BYTES, out, free
    assert simulated.NAME in emptied
    assert_same(found, cpu)


def an_interrupted_run_goes_on(path):
    solved = GPTQModifier.on_solved
    source, device, recipe = small_llama(path), simulated.make(), gptq(**groups(inputs=INT8))

    def interrupt(self, state, block):
        solved(self, state, block)
        if block.name.endswith(".1"):
            raise KeyboardInterrupt

    try:
        GPTQModifier.on_solved = interrupt
        with pytest.raises(KeyboardInterrupt):
            oneshot(source, recipe, data(), path / "device", device)
    finally:
        GPTQModifier.on_solved = solved
    assert_same(
        oneshot(source, recipe, data(), path / "device", device),
        oneshot(source, recipe, data(), path / "cpu", "cpu"),
    )


def evaluation_is_same(path):
    for name, seed in (("model", 0), ("original", 1)):
        stored(llama(hidden_size=32, intermediate_size=32, initializer_range=0.12 + 0.1 * seed), path / name)
        tokenizer().save_pretrained(path / name)
    questions = [{"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 1}]
    mlp, rows = MLP(4, 4), torch.rand(5, 4)
    cpu, device = (
        (
            bitpress.evaluate(path / "model", sentences(), original=path / "original", choices=questions, device=place),
            bitpress.evaluate(copy.deepcopy(mlp).to(place), rows, original=MLP(4, 4).to(place)).outputs.samples,
        )
        for place in ("cpu", str(simulated.make()))
    )
    assert cpu[0].agreement.divergence > 0
    # What torch composes for any device adds up in another order.
    of_tokens = device[0].tokens.tensors()
    assert all(value.device.type == "cpu" for value in of_tokens.values())
    torch.testing.assert_close(of_tokens, cpu[0].tokens.tensors(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(device[0].choices.log_likelihoods, cpu[0].choices.log_likelihoods, rtol=1e-4, atol=1e-6)
    assert cpu[1] == device[1] == 5


def devices_do_not_mix():
    """The device is one: what CUDA refuses is refused, and nothing else."""
    device = simulated.make()
    host = torch.arange(12.0).reshape(3, 4)
    there = host.to(device)
    refused = [
        lambda: there + host,
        lambda: host.add_(there),
        lambda: there @ host.T,
        lambda: torch.cat([there, host]),
        lambda: torch.where(host > 3, there, 0.0),
        lambda: host[torch.arange(2, device=device)],
        lambda: there.index_add_(0, torch.arange(3), there),
        lambda: there.masked_fill_(host > 3, 0.0),
        lambda: torch.mul(host, 2, out=there),
        lambda: torch.randn(3, device=device, generator=torch.Generator()),
        there.numpy,
    ]
    for operation in refused:
        with pytest.raises((RuntimeError, TypeError)):
            operation()
    view = there.T[1:]
    view[0].mul_(2).add_(torch.tensor(1.0))
    host[:, 1] = host[:, 1] * 2 + 1
    assert view.device == device
    assert find_device(simulated.NAME) == device
    assert torch.equal(there.cpu(), host)
    assert torch.equal(there[torch.tensor([2, 0])].cpu(), host[[2, 0]])
    assert view.data_ptr() == there.data_ptr() + there.element_size()


@pytest.fixture(scope="module")
def elsewhere():
    """Runs a function of this file in the process that has the device."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def test_devices_do_not_mix(elsewhere):
    elsewhere(devices_do_not_mix)


@pytest.mark.parametrize("name", STREAMED)
def test_streamed(elsewhere, name, tmp_path):
    elsewhere(streamed_is_same, name, tmp_path)


@pytest.mark.parametrize("name", LOADED)
def test_loaded(elsewhere, name, tmp_path):
    elsewhere(loaded_is_same, name, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_models(elsewhere, name, tmp_path):
    elsewhere(model_is_same, name, tmp_path)


def test_evaluation(elsewhere, tmp_path):
    elsewhere(evaluation_is_same, tmp_path)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_activations_elsewhere_change_nothing(elsewhere, place, tmp_path):
    elsewhere(activations_elsewhere_change_nothing, place, tmp_path)


def test_an_interrupted_run_goes_on(elsewhere, tmp_path):
    elsewhere(an_interrupted_run_goes_on, tmp_path)
