"""Mixtures of experts: stored one by one and packed where readers take them so, and read back bit for bit."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import architectures
import pytest
import tiny
import torch
from compressing import awq, rtn, scheme, token_ids
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import bitpress
from bitpress import checkpoints, oneshot
from bitpress.checkpoints import directory as directories
from bitpress.checkpoints.pretrained import load_pretrained
from bitpress.models.experts import find_layer, fused_experts, named_layers
from bitpress.modifiers import QuantizationModifier
from bitpress.quantization import preset_name_to_scheme

MERGED = ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "ernie4_5_moe"]
"""transformers merges one weight per expert when it loads these."""
PACKED = [*MERGED, "llama4", "granitemoe"]
DENSE = ["gpt_oss", "jetmoe"]
"""No reader takes their experts packed."""
READ = [*MERGED, "llama4"]
"""transformers reads their experts packed."""

GATED = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
PARTS = dict.fromkeys(PACKED, GATED) | {"mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}
# By the owner's name in the model
STORED_OWNERS = {
    "qwen3_moe": {"model.layers.1.mlp.experts": "model.layers.1.mlp.experts"},
    "mixtral": {f"model.layers.{i}.mlp.experts": f"model.layers.{i}.block_sparse_moe.experts" for i in range(2)},
    "deepseek_v3": {"model.layers.1.mlp.experts": "model.layers.1.mlp.experts"},
    "olmoe": {f"model.layers.{i}.mlp.experts": f"model.layers.{i}.mlp.experts" for i in range(2)},
    "ernie4_5_moe": {"model.layers.1.mlp.experts": "model.layers.1.mlp.experts"},
    "llama4": {"model.layers.1.feed_forward.experts": "model.layers.1.feed_forward.experts"},
    "granitemoe": {
        f"model.layers.{i}.block_sparse_moe.experts": f"model.layers.{i}.block_sparse_moe.experts" for i in range(2)
    },
}
EXPERTS = 4
SAVED_AGAIN = ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "jetmoe"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Tiny models as transformers loads them."""
    root = tmp_path_factory.mktemp("sources")

    def source(family, dtype=torch.float32):
        folder = root / family
        if not folder.exists():
            architectures.ARCHITECTURES[family].build().save_pretrained(folder)
        return load_pretrained(folder, dtype=dtype)

    return source


def answer(model, family="qwen3_moe"):
    return architectures.output(model, architectures.ARCHITECTURES[family].inputs(2, 24, 3))


def tensors_of(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def experts_of(model):
    found = {name: fused_experts(module) for name, module in model.named_modules()}
    return {name: experts for name, experts in found.items() if experts is not None}


def expert_layers(model):
    return {f"{owner}.{local}": layer for owner, e in experts_of(model).items() for local, layer in e.layers.items()}


def assert_saved_again(loaded, folder, again):
    """The tensors of ``folder``, whichever library saves the model."""
    if getattr(loaded, "hf_quantizer", None) is None:
        bitpress.save(loaded, again)
    else:
        loaded.save_pretrained(again)
    before, after = tensors_of(folder), tensors_of(again)
    assert after.keys() == before.keys()
    assert [name for name, t in before.items() if not tiny.same_bits(t, after[name])] == []


def assert_read_by_transformers(model, folder, family):
    assert torch.equal(answer(type(model).from_pretrained(folder), family), answer(model, family))


def assert_read_or_refused(model, folder, family):
    try:
        loaded = type(model).from_pretrained(folder)
    except (RuntimeError, ValueError):
        return
    assert torch.equal(answer(loaded, family), answer(model, family))


SCHEMES = {
    "groups, symmetric": {"symmetric": True},
    "groups, asymmetric": {"symmetric": False},
    "channels, symmetric": {"symmetric": True, "strategy": "channel"},
    "3 bits, symmetric": {"symmetric": True, "bits": 3},
    "8 bits, asymmetric": {"symmetric": False, "bits": 8},
}


# Experts that are packed.


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in PACKED for case in SCHEMES if "groups" in case or family == "mixtral"],
)
def test_packed_experts_are_stored_one_by_one_and_load_back(family, case, sources, tmp_path, caplog):
    model = oneshot(sources(family), None, rtn(**SCHEMES[case]))
    model.save_pretrained(tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    symmetric = SCHEMES[case]["symmetric"]
    kinds = ["weight_packed", "weight_scale", "weight_shape", *([] if symmetric else ["weight_zero_point"])]
    expected = {
        f"{stored_owner}.{expert}.{part}.{kind}"
        for stored_owner in STORED_OWNERS[family].values()
        for expert in range(EXPERTS)
        for part in PARTS[family].values()
        for kind in kinds
    }
    assert {name for name in stored if ".experts." in name} == expected
    bits = SCHEMES[case].get("bits", 4)
    for owner, experts in experts_of(model).items():
        for local, layer in experts.layers.items():
            expert, part = local.split(".")
            name = f"{STORED_OWNERS[family][owner]}.{expert}.{PARTS[family][part]}"
            assert stored[f"{name}.weight_shape"].tolist() == list(layer.weight.shape)
            if bits != 3:  # how these are packed is compressed-tensors' affair
                words = layer.weight.shape[0] * math.ceil(layer.weight.shape[1] * bits / 32)
                assert stored[f"{name}.weight_packed"].numel() == words
    loaded = checkpoints.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(answer(loaded, family), answer(model, family))
    if family in READ and (symmetric or family == "llama4"):
        assert_read_by_transformers(model, tmp_path / "out", family)
    elif family in READ:
        assert_read_or_refused(model, tmp_path / "out", family)
        assert "transformers up to" in caplog.text
    else:
        assert "transformers has no reader for that" in caplog.text
        assert "bitpress.load" in caplog.text


@pytest.mark.parametrize(
    ("family", "symmetric"), [("mixtral", True), ("llama4", True), *((family, False) for family in SAVED_AGAIN)]
)
def test_a_loaded_model_is_saved_again_to_the_same_tensors(family, symmetric, sources, tmp_path):
    model = oneshot(sources(family), None, rtn(symmetric=symmetric))
    model.save_pretrained(tmp_path / "out")
    loaded = checkpoints.load(tmp_path / "out")
    assert_saved_again(loaded, tmp_path / "out", tmp_path / "again")
    assert torch.equal(answer(checkpoints.load(tmp_path / "again"), family), answer(model, family))


FLOATS = {"FP8": None, "FP8_DYNAMIC": None, "MXFP4A16": None, "MXFP8A16": "several scales", "NVFP4A16": "global scales"}
"""Presets, and what transformers cannot read of experts that are stored so."""


@pytest.mark.parametrize("preset", FLOATS)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama4"])
def test_floats(family, preset, sources, tmp_path, caplog):
    weights = preset_name_to_scheme(preset, ["Linear"]).model_copy(update={"input_activations": None})
    recipe = QuantizationModifier(scheme=weights, ignore=["lm_head"])
    model = oneshot(sources(family, torch.bfloat16), None, recipe)
    model.save_pretrained(tmp_path / "out")
    assert any(".experts.1." in name and name.endswith("weight_scale") for name in tensors_of(tmp_path / "out"))
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))
    unread = None if family == "llama4" else FLOATS[preset]  # its experts become layers
    if unread:
        assert unread in caplog.text
        assert "bitpress.load" in caplog.text
    else:
        assert "transformers" not in caplog.text
        assert torch.equal(answer(type(model).from_pretrained(tmp_path / "out", dtype="auto")), answer(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, sources, tmp_path):
    model = oneshot(sources("qwen3_moe", dtype), None, rtn(symmetric=True))
    model.save_pretrained(tmp_path / "out")
    for back in (type(model).from_pretrained(tmp_path / "out", dtype="auto"), checkpoints.load(tmp_path / "out")):
        assert answer(back).dtype == dtype
        assert torch.equal(answer(back), answer(model))


def test_awq(sources, tmp_path):
    model = sources("qwen3_moe")
    before = answer(model)
    oneshot(model, token_ids(), awq(symmetric=True), num_calibration_samples=6)
    assert not torch.equal(answer(model), before)
    model.save_pretrained(tmp_path / "out")
    assert_read_by_transformers(model, tmp_path / "out", "qwen3_moe")
    assert torch.equal(answer(checkpoints.load(tmp_path / "out")), answer(model))


def test_what_is_loaded_is_quantized_on_the_same_grid(sources, tmp_path):
    model = oneshot(sources("mixtral"), None, rtn())
    model.save_pretrained(tmp_path / "out")
    loaded = checkpoints.load(tmp_path / "out")
    layers, back = expert_layers(model), expert_layers(loaded)
    assert layers.keys() == back.keys()
    for name, layer in layers.items():
        assert back[name].quantization_scheme.weights == layer.quantization_scheme.weights
        assert torch.equal(back[name].weight_scale, layer.weight_scale)
        assert torch.equal(back[name].weight_zero_point, layer.weight_zero_point)
        assert torch.equal(back[name].weight, layer.weight)
    with pytest.raises(bitpress.BitpressError, match="quantized already"):
        oneshot(loaded, None, rtn())


def test_shards(sources, tmp_path):
    model = oneshot(sources("qwen3_moe"), None, rtn())
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(answer(checkpoints.load(tmp_path / "out")), answer(model))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llama4_vl", "glm4v_moe"])
def test_models_that_see(family, sources, tmp_path):
    if family not in architectures.ARCHITECTURES:
        pytest.skip("transformers lacks it")
    model = oneshot(sources(family), None, rtn(["re:.*(lm_head|vision|visual).*", "re:.*projector.*"]))
    model.save_pretrained(tmp_path / "out")
    assert any(".experts." in name and name.endswith("weight_packed") for name in tensors_of(tmp_path / "out"))
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))


@pytest.mark.parametrize(
    "targets",
    [["re:.*experts.*"], ["re:.*gate_proj$", "re:.*up_proj$", "re:.*down_proj$"], ["re:.*_proj$"]],
    ids=str,
)
@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_targets_that_name_the_experts(family, targets, sources, tmp_path):
    """The checkpoint's names may be others than those the recipe speaks of."""
    model = oneshot(sources(family), None, rtn((), symmetric=True, targets=targets))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))
    if family in READ:
        assert_read_by_transformers(model, tmp_path / "out", family)


# Experts that are not, or not all.


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("family", DENSE)
def test_experts_that_no_reader_takes_packed_are_stored_dense_on_the_grid(family, symmetric, sources, tmp_path, caplog):
    model = oneshot(sources(family), None, rtn(symmetric=symmetric))
    model.save_pretrained(tmp_path / "out")
    assert "hold the quantized values but are stored dense" in caplog.text
    stored, state = tensors_of(tmp_path / "out"), model.state_dict()
    fused = [f"{owner}.{name}" for owner, e in experts_of(model).items() for name in e.parameters]
    assert fused
    for name in fused:
        assert torch.equal(stored[name], state[name])
    assert any(name.endswith("weight_packed") for name in stored)
    assert_read_by_transformers(model, tmp_path / "out", family)
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))


IGNORED = {
    "all experts": "re:.*experts.*",
    "those of a layer": "re:.*layers.1.*experts.*",
    "one": r"re:.*experts\.1\..*",
    "a projection": "re:.*experts.*down_proj$",
}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        (family, case)
        for family in [*PACKED, *DENSE]
        for case in IGNORED
        if "layer" in case
        or family in ("qwen3_moe", "mixtral")
        or (case == "one" and family in ("llama4", "granitemoe"))
    ],
)
def test_experts_that_are_ignored_are_never_random(family, case, sources, tmp_path):
    model = oneshot(sources(family), None, rtn(["lm_head", IGNORED[case]], symmetric=True))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))
    packed = any(".experts." in name and name.endswith("weight_packed") for name in tensors_of(tmp_path / "out"))
    if family in READ or not packed:
        assert_read_by_transformers(model, tmp_path / "out", family)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "llama4"])
def test_a_loaded_model_with_ignored_experts_is_saved_again(family, sources, tmp_path):
    model = oneshot(sources(family), None, rtn(["lm_head", "re:.*experts.*"], symmetric=True))
    model.save_pretrained(tmp_path / "out")
    assert_saved_again(checkpoints.load(tmp_path / "out"), tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama4", "granitemoe"])
def test_attention_and_experts_in_schemes_of_their_own(family, sources, tmp_path):
    groups = {
        "attention": scheme(bits=8, symmetric=True, strategy="channel", targets=["re:.*self_attn.*"]),
        "experts": scheme(bits=4, symmetric=True, targets=["re:.*experts.*"]),
    }
    model = oneshot(sources(family), None, QuantizationModifier(config_groups=groups))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))
    stored = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in stored} == {4, 8}
    if family in READ:
        assert_read_by_transformers(model, tmp_path / "out", family)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4", "granitemoe"])
def test_experts_in_two_schemes(family, sources, tmp_path):
    groups = {
        "gate, up": scheme(bits=4, symmetric=True, targets=["re:.*experts.*(gate|up)_proj$"]),
        "down": scheme(bits=8, symmetric=True, targets=["re:.*experts.*down_proj$"]),
    }
    model = oneshot(sources(family), None, QuantizationModifier(config_groups=groups))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))
    if family in READ:
        assert_read_by_transformers(model, tmp_path / "out", family)


CONFIGS = {
    "all": rtn(symmetric=True),
    "experts ignored": rtn(["lm_head", "re:.*experts.*"], symmetric=True),
    "a layer's ignored": rtn(["lm_head", "re:.*layers.1.*experts.*"], symmetric=True),
    "only experts": rtn((), symmetric=True, targets=["re:.*experts.*"]),
    "two schemes": [
        QuantizationModifier(
            config_groups={
                "attention": scheme(bits=8, symmetric=True, targets=["re:.*self_attn.*"]),
                "experts": scheme(bits=4, symmetric=True, targets=["re:.*experts.*"]),
            }
        )
    ],
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("Qwen3MoeForCausalLM", case) for case in CONFIGS), ("GraniteMoeForCausalLM", "two schemes")],
)
def test_the_config_lists_no_thousands_of_names(kind, case, tmp_path):
    model = architectures._built(kind, {"num_experts": 40, "num_local_experts": 40, "intermediate_size": 32})()
    assert len(expert_layers(model)) == 2 * 3 * 40
    oneshot(model, None, CONFIGS[case])
    model.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    names = [*config["ignore"], *(t for group in config["config_groups"].values() for t in group["targets"])]
    assert len(names) <= 2 * 4 + 6
    assert not [name for name in names if ".experts.7." in name]


# Other ways to save.


@pytest.mark.parametrize("family", ["mixtral", "llama4", "granitemoe", "gpt_oss", "jetmoe"])
def test_dense_on_request(family, sources, tmp_path):
    model = sources(family)
    model.save_pretrained(tmp_path / "plain")
    oneshot(model, None, rtn())
    model.save_pretrained(tmp_path / "out", save_compressed=False)
    assert "quantization_config" not in config_of(tmp_path / "out")
    stored, plain = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in plain.items()}
    assert_read_by_transformers(model, tmp_path / "out", family)
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))


def test_a_disk_with_room_for_the_packed_model_is_large_enough(sources, tmp_path, monkeypatch):
    model = architectures._built("Qwen3MoeForCausalLM", {"num_experts": 32})()
    oneshot(model, None, rtn(symmetric=True))
    model.save_pretrained(tmp_path / "first")
    needed = sum(file.stat().st_size for file in (tmp_path / "first").iterdir())
    assert needed < 0.7 * sum(p.nbytes for p in model.parameters())
    usage = shutil.disk_usage(tmp_path)
    free = directories.SPARE_BYTES + needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    model.save_pretrained(tmp_path / "second")
    assert tensors_of(tmp_path / "second").keys() == tensors_of(tmp_path / "first").keys()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_changed_expert_is_not_saved_as_quantized(family, sources, tmp_path):
    model = oneshot(sources(family), None, rtn())
    owner = next(iter(experts_of(model)))
    with torch.no_grad():
        model.get_parameter(f"{owner}.down_proj")[2] += 1e-3
    with pytest.raises(bitpress.BitpressError, match=rf"{owner}\.2\.down_proj\.weight is not what oneshot left"):
        model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", save_compressed=False)
    assert torch.equal(answer(checkpoints.load(tmp_path / "out"), family), answer(model, family))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_model_whose_experts_came_fused_is_stored_like_any_other(family, sources, tmp_path):
    """transformers writes them so on request, and remembers that it has read them so."""
    model = sources(family)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = type(model).from_pretrained(tmp_path / "fused")
    assert torch.equal(answer(fused, family), answer(model, family))
    for each, folder in ((model, "one"), (fused, "two")):
        oneshot(each, None, rtn(symmetric=True))
        each.save_pretrained(tmp_path / folder)
    one, two = ({n for n in tensors_of(tmp_path / folder) if ".experts." in n} for folder in ("one", "two"))
    assert one == two
    assert_read_by_transformers(model, tmp_path / "two", family)


# Modules that no library wrote.


class Experts(nn.Module):
    """Gated experts; ``turned`` keeps inputs before outputs, with biases and by turns."""

    def __init__(self, count=3, width=32, middle=64, *, turned=False):
        super().__init__()
        self.is_transposed, self.is_concatenated = turned, not turned
        up, down = ((width, 2 * middle), (middle, width)) if turned else ((2 * middle, width), (width, middle))
        self.gate_up_proj = nn.Parameter(torch.randn(count, *up) / 6)
        self.down_proj = nn.Parameter(torch.randn(count, *down) / 6)
        if turned:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(count, 2 * middle))
            self.down_proj_bias = nn.Parameter(torch.randn(count, width))

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for expert in range(len(self.down_proj)):
            rows, place = torch.where(index == expert)
            if not len(rows):
                continue
            if self.is_transposed:
                both = x[rows] @ self.gate_up_proj[expert] + self.gate_up_proj_bias[expert]
                middle = both[:, ::2].sigmoid() * both[:, 1::2]
                made = middle @ self.down_proj[expert] + self.down_proj_bias[expert]
            else:
                gate, up = F.linear(x[rows], self.gate_up_proj[expert]).chunk(2, -1)
                made = F.linear(gate.sigmoid() * up, self.down_proj[expert])
            out.index_add_(0, rows, made * weights[rows, place, None])
        return out


class Mixture(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.router = nn.Linear(32, 3)
        self.experts = Experts(**options)

    def forward(self, x):
        weights, index = self.router(x).softmax(-1).topk(2)
        return x + self.experts(x, index, weights)


class Plain(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(Mixture(**options) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Single(nn.Module):
    """One projection per module."""

    def __init__(self):
        super().__init__()
        self.output_size, self.input_size = 64, 32
        self.weight = nn.Parameter(torch.randn(3, 64, 32))

    def forward(self, x):
        return sum(F.linear(x, w) for w in self.weight)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Single()
        self.head = nn.Linear(64, 16)

    def forward(self, x):
        return self.head(self.first(x))


PLAIN = {
    "gated": Plain,
    "turned, with biases": partial(Plain, turned=True),
    "single": Holder,
    "a mixture alone": Mixture,
}


def rows(count=12, seed=0):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model):
    return model(rows(seed=9))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_modules(kind, symmetric, tmp_path):
    model, fresh = tiny.seeded(PLAIN[kind]), tiny.seeded(PLAIN[kind], seed=1)
    before = outputs(model)
    oneshot(model, None, rtn((), symmetric=symmetric))
    assert not torch.equal(outputs(model), before)
    bitpress.save(model, tmp_path / "out")
    assert not torch.equal(outputs(fresh), outputs(model))
    assert checkpoints.load(tmp_path / "out", fresh) is fresh
    assert torch.equal(outputs(fresh), outputs(model))
    tiny.assert_unchanged(fresh, tiny.snapshot(model))
    bitpress.save(fresh, tmp_path / "again")
    first, second = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(tiny.same_bits(t, second[name]) for name, t in first.items())
    quantized = {n for n, m in named_layers(model) if hasattr(m, "quantization_scheme")}
    assert {f"{n}.weight_packed" for n in quantized} == {n for n in first if n.endswith("weight_packed")}
    fused = {f"{owner}.{p.parameter}" for owner, e in experts_of(model).items() for p in e.projections}
    assert not fused & first.keys()


def test_a_plain_module_that_is_the_experts_itself(tmp_path):
    model, fresh = tiny.seeded(Single), tiny.seeded(Single, seed=1)
    oneshot(model, None, rtn(()))
    bitpress.save(model, tmp_path / "out")
    assert "0.weight_packed" in tensors_of(tmp_path / "out")
    checkpoints.load(tmp_path / "out", fresh)
    assert torch.equal(outputs(fresh), outputs(model))
    assert hasattr(find_layer(fresh, "0"), "quantization_scheme")


def test_a_plain_module_with_some_experts_ignored(tmp_path):
    model, fresh = tiny.seeded(Plain), tiny.seeded(Plain, seed=1)
    oneshot(model, None, rtn([r"re:.*experts\.1\..*"]))
    bitpress.save(model, tmp_path / "out")
    checkpoints.load(tmp_path / "out", fresh)
    assert torch.equal(outputs(fresh), outputs(model))
