"""Every recipe that is shipped: compressed, saved, loaded; and what its comment says of it."""

import re

import pytest
import tiny
import torch
from compressing import token_ids
from transformers import AutoModelForCausalLM

import bitpress
from bitpress import BitpressError, oneshot
from bitpress.session.recipe import Recipe, arguments_of, shipped_recipes

RECIPES = shipped_recipes()
# Arguments without a default.
NEEDED = {"preset": {"scheme": "W6A16"}}
# What is quantized besides weights.
ACTIVATIONS = {
    "fp8", "fp8-block", "fp8-dynamic", "mxfp4", "mxfp8", "nvfp4", "smoothquant-gptq-w8a8", "smoothquant-w8a8", "w4a8",
    "w4afp8", "w8a8-dynamic", "w8a8-static",
}  # fmt: skip
OF_ATTENTION = {"attention-fp8", "kv-cache-fp8", "kv-cache-int8"}


def comment(name):
    return [line[2:] for line in RECIPES[name].read_text().splitlines() if line.startswith("#")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Widths that groups of 128 divide."""
    folder = tmp_path_factory.mktemp("source")
    tiny.llama(hidden_size=128, intermediate_size=128, num_hidden_layers=1).save_pretrained(folder)
    return folder


def read(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", RECIPES)
def test_the_comment_is_short(name):
    lines = RECIPES[name].read_text().splitlines()
    about = comment(name)
    # What it is for, then what it costs; nothing behind the recipe's beginning.
    assert 2 <= len(about) <= 3
    assert lines[: len(about)] == [f"# {line}" for line in about]
    assert all(len(line) <= 125 for line in lines)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_evaluated_is_what_is_loaded(name, source, tmp_path):
    model = read(source)
    before = tiny.logits(model)
    data = None if "without data" in " ".join(comment(name)) else token_ids(4)
    options = {"recipe_args": NEEDED.get(name), "num_calibration_samples": 4}
    writes = any(modifier.writes for modifier in Recipe.of(name, NEEDED.get(name)).modifiers)
    if data is not None and not writes:
        with pytest.raises(BitpressError, match=r"no dataset was given|needs calibration data"):
            oneshot(model, None, name, **options)
    oneshot(model, data, name, **options)
    check_schemes(name, model)
    found = tiny.logits(model)
    # Four bits of a random model are far from it, but not another model.
    assert 0 < (found - before).norm() < before.norm()
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(tiny.logits(bitpress.load(tmp_path / "out", packed=False)), found)
    assert torch.equal(tiny.logits(read(tmp_path / "out")), found)


def check_schemes(name, model):
    """The model is quantized as the recipe's name says."""
    schemes = {n: m.quantization_scheme for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    linear = {n: s for n, s in schemes.items() if s.weights is not None}
    if name in OF_ATTENTION:
        assert not linear
        assert list(schemes) == ["model.layers.0.self_attn"]
        return
    assert len(linear) == 7
    stated = re.search(r"(?:\bw|\bq|fp)(\d)", name)
    if stated is not None:
        assert {s.weights.num_bits for s in linear.values()} == {int(stated[1])}
    assert all((s.input_activations is not None) == (name in ACTIVATIONS) for s in linear.values())
    assert not hasattr(model.lm_head, "quantization_scheme")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("gguf-")])
def test_the_grids_of_gguf_fit_it(name, source, tmp_path):
    pytest.importorskip("gguf")
    out = tmp_path / "out"
    oneshot(read(source), token_ids(2), name, num_calibration_samples=2, output_dir=out, format="gguf")
    assert (out / "model.gguf").stat().st_size > 0


def test_arguments_reach_the_schemes(source):
    for name in RECIPES:
        assert set(NEEDED.get(name, {})) == {n for n, v in arguments_of(RECIPES[name]).items() if v is None}
    model = read(source)
    oneshot(model, None, "preset", recipe_args={"scheme": "W4A4", "ignore": ["lm_head", "re:.*down_proj"]})
    mlp = model.model.layers[0].mlp
    assert mlp.up_proj.quantization_scheme.input_activations.num_bits == 4
    assert not hasattr(mlp.down_proj, "quantization_scheme")


def test_a_cache_on_top(source, tmp_path):
    model = read(source)
    oneshot(model, token_ids(2), "w8a8-dynamic+kv-cache-fp8", num_calibration_samples=2, output_dir=tmp_path / "out")
    config = read(tmp_path / "out").config.quantization_config
    written = config if isinstance(config, dict) else config.to_dict()
    scheme = written.get("kv_cache_scheme") or written["quantization_config"]["kv_cache_scheme"]
    assert scheme["num_bits"] == 8
    assert torch.equal(tiny.logits(bitpress.load(tmp_path / "out", packed=False)), tiny.logits(model))
