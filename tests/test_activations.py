"""Quantized activations and caches from end to end: the model in memory computes what the loaded checkpoint does."""

import json
import logging
from functools import partial

import pytest
import tiny
import torch
from compressing import awq, scheme, token_ids
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import bitpress
from bitpress import AWQModifier, BitpressError, GPTQModifier, QuantizationModifier, Recipe, oneshot
from bitpress.quantization import QuantizationArgs, QuantizationScheme, is_preset_scheme

INT8 = QuantizationArgs(num_bits=8)
PER_TOKEN = QuantizationArgs(num_bits=8, dynamic=True, strategy="token")
FP8 = QuantizationArgs(num_bits=8, type="float")
PER_HEAD = QuantizationArgs(num_bits=8, type="float", strategy="attn_head")
ASYMMETRIC = QuantizationArgs(num_bits=8, symmetric=False)

PRESETS = [
    "W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP4XFP8", "MXFP6A8", "MXFP8",
]  # fmt: skip
# transformers gives the weights of these in bfloat16, whatever the model's dtype.
BFLOAT16_ONLY = ("NVFP4", "MXFP4", "MXFP4XFP8", "MXFP6A8", "MXFP8")


def group(bits=8, **activations):
    weights = QuantizationArgs(num_bits=bits, strategy="channel")
    return QuantizationScheme(targets=["Linear"], weights=weights, **activations)


def of_attention(args, targets=("LlamaAttention",)):
    return QuantizationScheme(targets=list(targets), input_activations=args)


RECIPES = {
    **{name: {"scheme": name} for name in PRESETS if is_preset_scheme(name)},
    "static": {"scheme": group(input_activations=INT8)},
    "static, asymmetric": {"scheme": group(input_activations=ASYMMETRIC)},
    "static inputs and outputs": {"scheme": group(input_activations=FP8, output_activations=INT8)},
    "static outputs of 4-bit layers": {"scheme": group(bits=4, output_activations=ASYMMETRIC)},
    "dynamic outputs": {"scheme": group(input_activations=PER_TOKEN, output_activations=PER_TOKEN)},
    "cache": {"kv_cache_scheme": INT8},
    "cache of floats": {"kv_cache_scheme": FP8, "scheme": "W8A8"},
    "cache per head": {"kv_cache_scheme": PER_HEAD, "scheme": "W4A16"},
    "asymmetric cache": {"kv_cache_scheme": ASYMMETRIC, "scheme": "W8A16"},
    "dynamic cache": {"kv_cache_scheme": QuantizationArgs(num_bits=8, dynamic=True, strategy="tensor")},
    "attention": {"config_groups": {"linears": group(), "attention": of_attention(INT8)}},
    "attention per head": {
        "config_groups": {"attention": of_attention(PER_HEAD, ["re:.*self_attn$"]), "l": group(input_activations=FP8)}
    },
    "attention by layer": {
        "config_groups": {
            "first": of_attention(FP8, ["model.layers.0.self_attn"]),
            "others": of_attention(INT8),
        },
        "kv_cache_scheme": INT8,
    },
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model wide enough for the presets' groups of 128, on the disk: a cast model has other rotary embeddings."""
    folder = tmp_path_factory.mktemp("dense")
    tiny.llama(hidden_size=128, intermediate_size=256).save_pretrained(folder)
    return lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def greedy(model):
    return model.generate(**tiny.tokens(2, 8), max_new_tokens=5, do_sample=False, use_cache=True)


@torch.no_grad()
def stepwise(model, length=5):
    """The last logits, with a cache that grows token by token."""
    ids, cache = tiny.tokens(2, length)["input_ids"], None
    for position in range(length):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    return out.logits


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loaded_checkpoint_says_the_same(recipe, dtype, dense, tmp_path):
    model = dense(dtype)
    before = tiny.logits(model)
    modifier = QuantizationModifier(ignore=["lm_head"], **RECIPES[recipe])
    oneshot(model, token_ids(), modifier, num_calibration_samples=6, output_dir=tmp_path)
    readers = [partial(bitpress.load, packed=False), partial(bitpress.load, exact=True)]
    if dtype == torch.bfloat16 or recipe not in BFLOAT16_ONLY:
        readers.append(AutoModelForCausalLM.from_pretrained)
    mine = tiny.logits(model)
    assert 0 < (mine - before).float().norm() / before.float().norm() < 0.8
    cached = "cache" in recipe or "attention" in recipe
    tokens, last = (greedy(model), stepwise(model)) if cached else (None, None)
    for reader in readers:
        loaded = reader(tmp_path)
        assert torch.equal(tiny.logits(loaded), mine)
        if cached:
            assert torch.equal(greedy(loaded), tokens)
            assert torch.equal(stepwise(loaded), last)
    assert Recipe.of(tmp_path / "recipe.yaml") == Recipe.of(modifier)
    assert "ct_hooked" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("modifiers", [
    [AWQModifier(bits=4, n_grid=4), QuantizationModifier(ignore=["lm_head"], scheme="W4A8", kv_cache_scheme=FP8)],
    [AWQModifier(bits=8, n_grid=4), GPTQModifier(ignore=["lm_head"], scheme=group(input_activations=ASYMMETRIC))],
], ids=["awq, rtn", "awq, gptq"])  # fmt: skip
def test_after_smoothing(modifiers, dense, tmp_path):
    model = oneshot(dense(torch.float32), token_ids(), modifiers, num_calibration_samples=6, output_dir=tmp_path)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tiny.logits(model))


# What static scales are: the greatest magnitudes in the model that ships, without quantized activations.


def without_activations(model, run):
    """Run a model whose weights are quantized and whose activations are not."""
    marked = [m for m in model.modules() if hasattr(m, "quantization_scheme")]
    for module in marked:
        module.quantization_enabled = False
    try:
        run()
    finally:
        for module in marked:
            module.quantization_enabled = True


def greatest(model, batches, pick, masks=None):
    """The greatest magnitude of ``pick(layer)`` over the batches, by layer."""
    found = {}

    def watch(name, kind):
        def hook(module, args, output=None):
            seen = args[0] if kind == "input" else output
            seen = seen[masks[watch.index]] if masks else seen
            found[name, kind] = max(found.get((name, kind), 0.0), float(seen.detach().abs().max()))

        return hook

    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and hasattr(layer, "quantization_scheme"):
            handles.append(layer.register_forward_pre_hook(watch(name, "input")))
            handles.append(layer.register_forward_hook(watch(name, "output")))

    def run():
        for watch.index, batch in enumerate(batches):
            pick(batch)

    with torch.no_grad():
        without_activations(model, run)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_scale_is_that_of_the_model_that_ships(pipeline, smoothed, padded):
    model = tiny.llama()
    batches = [tiny.tokens(2, 24, seed) for seed in range(3)]
    if padded:
        for batch in batches:
            batch["attention_mask"][0, 10:] = 0
    static = QuantizationModifier(
        ignore=["lm_head"], scheme=group(input_activations=INT8, output_activations=INT8), kv_cache_scheme=INT8
    )
    recipe = [AWQModifier(bits=8, n_grid=4), static] if smoothed else [static]
    tiny.compress(model, recipe, tiny.data_of(batches), pipeline=pipeline)
    masks = [batch["attention_mask"].bool() for batch in batches]
    found = greatest(model, batches, lambda b: model(**b, use_cache=False), masks)
    assert len(found) == 28
    for (name, kind), magnitude in found.items():
        scale = getattr(model.get_submodule(name), f"{kind}_scale")
        assert float(scale) == pytest.approx(magnitude / 127.5, rel=1e-4)
    for layer in model.model.layers:
        # Values are cached as they come from their layer.
        assert torch.equal(layer.self_attn.v_scale, layer.self_attn.v_proj.output_scale)
        assert torch.equal(layer.self_attn.q_proj.input_scale, layer.self_attn.k_proj.input_scale)
        assert torch.equal(layer.mlp.gate_proj.input_scale, layer.mlp.up_proj.input_scale)


def test_a_block_that_runs_twice_has_the_range_of_both_runs():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])

        def forward(self, x):
            for factor in (4.0, 1.0):
                for layer in self.layers:
                    x = layer(factor * x)
            return x

    torch.manual_seed(0)
    model, x = Loop().eval(), torch.randn(32, 16)
    tiny.compress(model, QuantizationModifier(scheme=group(input_activations=INT8)), tiny.data_of([x]))
    assert float(model.layers[0][0].input_scale) == pytest.approx(float((4 * x).abs().max()) / 127.5)
    assert float(model.layers[1][0].input_scale) > 2 / 127.5


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_states_of_attention_are_those_behind_the_rotary_embedding(strategy):
    model, batch = tiny.llama(), tiny.tokens(2, 24)
    attention = of_attention(QuantizationArgs(num_bits=8, strategy=strategy))
    tiny.compress(model, QuantizationModifier(config_groups={"a": attention}), tiny.data_of([batch]))
    cached = []
    without_activations(model, lambda: cached.append(model(**batch, use_cache=True).past_key_values))
    for index, layer in enumerate(model.model.layers):
        for states, scale in (
            (cached[0].layers[index].keys, layer.self_attn.k_scale),
            (cached[0].layers[index].values, layer.self_attn.v_scale),
        ):
            magnitude = states.abs().amax((0, 2, 3)) if strategy == "attn_head" else states.abs().amax().view(1)
            torch.testing.assert_close(scale.flatten(), magnitude.detach() / 127.5, rtol=1e-5, atol=0)
        assert layer.self_attn.q_scale.shape == ((4, 1, 1) if strategy == "attn_head" else (1,))


# What is stored, and said.


def test_names_and_dtypes_in_the_checkpoint(dense, tmp_path):
    recipe = QuantizationModifier(
        ignore=["lm_head"],
        scheme=group(input_activations=ASYMMETRIC, output_activations=INT8),
        kv_cache_scheme=PER_HEAD,
    )
    model = oneshot(dense(torch.bfloat16), token_ids(), recipe, num_calibration_samples=6, output_dir=tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    at = "model.layers.0.self_attn"
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in stored.items() if name.startswith(at)}
    assert shapes[f"{at}.q_proj.input_scale"] == (torch.bfloat16, (1,))
    assert shapes[f"{at}.q_proj.input_zero_point"] == (torch.int8, (1,))
    assert shapes[f"{at}.q_proj.output_scale"] == (torch.bfloat16, (1,))
    assert f"{at}.q_proj.output_zero_point" not in shapes
    assert shapes[f"{at}.k_scale"] == shapes[f"{at}.v_scale"] == (torch.bfloat16, (2, 1, 1))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"
    assert [g["input_activations"]["symmetric"] for g in config["config_groups"].values()] == [False]
    assert not [name for name in model.state_dict() if name.endswith(("input_scale", "k_scale"))]


def test_the_report_says_how_activations_are_quantized(dense):
    recipe = QuantizationModifier(ignore=["lm_head"], scheme="NVFP4", kv_cache_scheme=INT8)
    model = oneshot(dense(torch.bfloat16), token_ids(), recipe, num_calibration_samples=6)
    report = json.loads(json.dumps(model.bitpress.report))
    layer, attention = model.model.layers[1].mlp.up_proj, model.model.layers[1].self_attn
    assert report["layers"]["model.layers.1.mlp.up_proj"]["input_activations"] == {
        "bits": 4, "type": "float", "strategy": "tensor_group", "dynamic": "local",
        "input_global_scale": layer.input_global_scale.tolist(),
    }  # fmt: skip
    assert report["attentions"]["model.layers.1.self_attn"]["k"] == {
        "bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "k_scale": attention.k_scale.tolist(),
    }  # fmt: skip


class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("inputs", [INT8, ASYMMETRIC, PER_TOKEN, FP8], ids=str)
def test_a_plain_module(inputs, tmp_path):
    torch.manual_seed(0)
    model, x = SimpleNet().eval(), torch.randn(40, 32)
    expected = model(x)
    oneshot(model, [x[:20], x[20:]], QuantizationModifier(scheme=group(input_activations=inputs)), output_dir=tmp_path)
    loaded = bitpress.load(tmp_path, SimpleNet())
    assert torch.equal(loaded(x), model(x))
    assert 0 < (model(x) - expected).norm() / expected.norm() < 0.05
    bitpress.save(loaded, tmp_path / "again")
    assert torch.equal(bitpress.load(tmp_path / "again", SimpleNet())(x), model(x))


def moe():
    config = {**tiny._GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    return tiny.seeded(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, tie_word_embeddings=False)))


@pytest.mark.parametrize("inputs", [PER_TOKEN, INT8], ids=["dynamic", "static"])
def test_experts_keep_their_activations_but_for_servers(inputs, tmp_path, caplog):
    packed = scheme(symmetric=True).model_copy(update={"input_activations": inputs, "format": "pack-quantized"})
    with caplog.at_level(logging.WARNING):
        recipe = QuantizationModifier(ignore=["lm_head"], scheme=packed)
        model = oneshot(moe(), token_ids(), recipe, num_calibration_samples=6, output_dir=tmp_path)
    assert "servers will quantize the inputs of the experts (24 layers" in caplog.text
    for reader in (AutoModelForCausalLM.from_pretrained, bitpress.load):
        assert torch.equal(tiny.logits(reader(tmp_path)), tiny.logits(model))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        scales = [file.get_tensor(n) for n in file.keys() if n.endswith("input_scale") and ".experts." in n]  # noqa: SIM118
    assert len(scales) == (24 if inputs is INT8 else 0)
    assert all(scale > 0 for scale in scales)


# What is refused.


@pytest.mark.parametrize("fields", [{"scheme": "FP8"}, {"scheme": "NVFP4"}, {"kv_cache_scheme": INT8}], ids=str)
def test_static_scales_need_data(fields, dense):
    recipe = QuantizationModifier(ignore=["lm_head"], **fields)
    with pytest.raises(BitpressError, match=r"is static, but no dataset was given .*: give oneshot one"):
        oneshot(dense(torch.float32), None, recipe)
    with pytest.raises(BitpressError, match="needs calibration data, but the datafree pipeline has none"):
        oneshot(dense(torch.float32), token_ids(), recipe, num_calibration_samples=6, pipeline="datafree")


def test_dynamic_scales_need_no_data(dense, tmp_path):
    recipe = QuantizationModifier(ignore=["lm_head"], scheme="FP8_DYNAMIC")
    model = oneshot(dense(torch.float32), None, recipe, output_dir=tmp_path)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tiny.logits(model))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny.gpt2, "GPT2LMHeadModel has no attention .* class GPT2Attention"),
        (tiny.opt, "OPTForCausalLM's attention cannot be quantized: .*num_key_value_heads"),
        (SimpleNet, "SimpleNet has no attention"),
    ],
)
def test_caches_that_compressed_tensors_cannot_hook(build, message):
    with pytest.raises(BitpressError, match=message):
        oneshot(build(), token_ids(), QuantizationModifier(kv_cache_scheme=INT8), num_calibration_samples=6)


def test_activations_of_layers_that_no_reader_quantizes():
    with pytest.raises(BitpressError, match=r"transformer\.h\.0\.attn\.c_attn \(Conv1D\).*weights only"):
        oneshot(tiny.gpt2(), None, QuantizationModifier(scheme=group().model_copy(
            update={"targets": ["Conv1D"], "input_activations": PER_TOKEN})))  # fmt: skip


def test_a_forward_that_is_not_the_class_own_is_not_replaced():
    model = SimpleNet()
    model.first.forward = lambda x, own=model.first.forward: own(x)
    with pytest.raises(BitpressError, match="the forward of first has been replaced"):
        oneshot(model, None, QuantizationModifier(scheme=group(input_activations=PER_TOKEN)))
    oneshot(model, None, QuantizationModifier(scheme=group()))


def test_a_layer_that_does_not_run_has_no_range():
    class Idle(SimpleNet):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(32, 8)

    model, x = Idle(), torch.randn(8, 32)
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match="the scale of idle is static, but no calibration batch has run it"):
        oneshot(model, [x], QuantizationModifier(scheme=group(input_activations=INT8)))
    tiny.assert_unchanged(model, before)
    oneshot(model, [x], QuantizationModifier(ignore=["idle"], scheme=group(input_activations=INT8)))


def test_attention_is_quantized_in_all_of_a_model_or_in_none(dense):
    groups = {"one": of_attention(INT8, ["model.layers.1.self_attn"])}
    with pytest.raises(BitpressError, match=r"model\.layers\.0\.self_attn is in no config group"):
        oneshot(dense(torch.float32), token_ids(), QuantizationModifier(config_groups=groups))


def test_nothing_is_left_behind_where_it_fails(dense, monkeypatch):
    def fail(self, state, block):
        raise RuntimeError("half-way")

    model = dense(torch.float32)
    before, implementation = tiny.snapshot(model), model.config._attn_implementation
    groups = {"attention": of_attention(INT8), "linears": group(input_activations=INT8)}
    monkeypatch.setattr(QuantizationModifier, "on_solved", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        oneshot(model, token_ids(), QuantizationModifier(ignore=["lm_head"], config_groups=groups))
    monkeypatch.undo()
    tiny.assert_unchanged(model, before)
    assert model.config._attn_implementation == implementation
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [name for name, _ in model.named_modules() if name.endswith(("kv_cache", "impl"))]
    recipe = [*awq(ignore=["lm_head"], mappings=None, group_size=32)]
    oneshot(model, token_ids(), recipe, num_calibration_samples=6)
