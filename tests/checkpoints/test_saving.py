"""Saving: packed on disk what is in memory, bit for bit; whole or not at all."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressing import awq, rtn, scheme, sentences, token_ids, tokenizer
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers import modeling_utils as transformers_saving

import bitpress
from bitpress import BitpressError, Recipe, checkpoints, oneshot
from bitpress.checkpoints import directory as directories
from bitpress.checkpoints import saving
from bitpress.modifiers import QuantizationModifier
from bitpress.quantization import QuantizationStrategy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Tiny models as transformers loads them: a model that is cast casts its rotary frequencies, a loaded one's are
    float32."""
    root = tmp_path_factory.mktemp("sources")

    def source(family="llama", dtype=torch.float32):
        folder = root / family
        if not folder.exists():
            getattr(tiny, family)().save_pretrained(folder)
        return loaded(folder, family, dtype)

    return source


@pytest.fixture
def compressed(sources):
    return oneshot(sources(), None, rtn())


def loaded(folder, family="llama", dtype="auto"):
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype)


def same_logits(a, b):
    x, y = tiny.logits(a), tiny.logits(b)
    return x.dtype == y.dtype and torch.equal(x, y)


def quantized(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "quantization_scheme")}


def tensors_of(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def litter(folder):
    return [p.name for p in Path(folder).iterdir() if p.name.endswith((".partial", ".old"))]


def words_a_row(columns, bits):
    dense = bits in (1, 2, 4, 8) or Version(saving._versions()[1]) >= Version("0.18")
    return math.ceil(columns * bits / 32) if dense else math.ceil(columns / (32 // bits))


# What is loaded back says what was in memory.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "bert", "gpt2"])
def test_the_designs_recipe_loads_back_bit_for_bit(family, dtype, sources, tmp_path):
    model = sources(family, dtype)
    before = tiny.logits(model)
    conv1d = family == "gpt2"
    ignore = {"bert": ["re:.*decoder$"], "gpt2": []}.get(family, ["lm_head"])
    oneshot(model, token_ids(), awq(ignore, targets=["Conv1D"] if conv1d else ["Linear"]), num_calibration_samples=6)
    assert not torch.equal(tiny.logits(model), before)
    model.save_pretrained(tmp_path / "out")
    assert same_logits(loaded(tmp_path / "out", family), model)
    assert len(quantized(model)) >= 8
    stored = tensors_of(tmp_path / "out")
    assert {n for n in quantized(model) if f"{n}.weight_packed" in stored} == (
        set() if conv1d else set(quantized(model))
    )


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3", "phi3", "gpt_neox", "bloom"])
def test_more_families_load_back_bit_for_bit(family, sources, tmp_path):
    model = sources(family)
    oneshot(model, token_ids(), awq(["re:.*(lm_head|embed_out)$"]), num_calibration_samples=6)
    model.save_pretrained(tmp_path / "out")
    assert same_logits(loaded(tmp_path / "out", family), model)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(b, torch.float32) for b in range(2, 9)] + [(b, d) for b in (3, 8) for d in DTYPES[1:]],
    ids=str,
)
def test_every_grid_is_packed_and_loads_back(bits, dtype, symmetric, strategy, sources, tmp_path):
    model = oneshot(sources(dtype=dtype), None, rtn(bits=bits, symmetric=symmetric, strategy=strategy))
    model.save_pretrained(tmp_path / "out")
    assert same_logits(loaded(tmp_path / "out"), model)
    stored = tensors_of(tmp_path / "out")
    for name, layer in quantized(model).items():
        rows, columns = layer.weight.shape
        own = {kind.removeprefix(f"{name}."): t for kind, t in stored.items() if kind.startswith(f"{name}.")}
        kinds = {"weight_packed", "weight_scale", "weight_shape", *([] if symmetric else ["weight_zero_point"])}
        assert set(own) == kinds
        assert own["weight_packed"].dtype == torch.int32
        assert own["weight_packed"].shape == (rows, words_a_row(columns, bits))
        assert own["weight_scale"].dtype == dtype
        groups = {"tensor": (1,), "channel": (rows, 1), "group": (rows, columns // 32)}
        assert own["weight_scale"].shape == groups[strategy]
        assert own["weight_shape"].tolist() == [rows, columns]
        unpacked = PackedQuantizationCompressor.decompress(own, layer.quantization_scheme)["weight"]
        assert torch.equal(unpacked, layer.weight)


def test_two_schemes_in_one_model(sources, tmp_path):
    groups = {
        "wide": scheme(bits=8, symmetric=True, strategy="channel", targets=["re:.*self_attn.*"]),
        "narrow": scheme(bits=3, group_size=16, targets=["re:.*mlp.*"]),
    }
    model = oneshot(sources(), None, QuantizationModifier(config_groups=groups))
    model.save_pretrained(tmp_path / "out")
    assert same_logits(loaded(tmp_path / "out"), model)
    stored = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    targets = {group["weights"]["num_bits"]: set(group["targets"]) for group in stored}
    assert targets == {
        8: {n for n in quantized(model) if "self_attn" in n},
        3: {n for n in quantized(model) if "mlp" in n},
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_integers_that_are_stored_one_a_byte(strategy, symmetric, bits, sources, tmp_path):
    loose = scheme(bits=bits, symmetric=symmetric, strategy=strategy).model_copy(update={"format": "int-quantized"})
    model = oneshot(sources(), None, QuantizationModifier(scheme=loose, ignore=["lm_head"]))
    model.save_pretrained(tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    kinds = {"weight", "weight_scale", *([] if symmetric else ["weight_zero_point"])}
    assert {n.removeprefix(f"{Q_PROJ}.") for n in stored if n.startswith(Q_PROJ)} == kinds
    assert stored[f"{Q_PROJ}.weight"].dtype == torch.int8
    assert config_of(tmp_path / "out")["quantization_config"]["format"] == "int-quantized"
    assert same_logits(loaded(tmp_path / "out"), model)
    assert same_logits(checkpoints.load(tmp_path / "out"), model)


def test_two_formats_in_one_model(sources, tmp_path):
    groups = {
        "loose": scheme(bits=8, strategy="channel", targets=["re:.*self_attn.*"]).model_copy(
            update={"format": "int-quantized"}
        ),
        "packed": scheme(targets=["re:.*mlp.*"]),
    }
    model = oneshot(sources(), None, QuantizationModifier(config_groups=groups))
    model.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["format"] == "mixed-precision"
    formats = {group["weights"]["num_bits"]: group["format"] for group in config["config_groups"].values()}
    assert formats == {8: "int-quantized", 4: "pack-quantized"}
    assert same_logits(loaded(tmp_path / "out"), model)
    assert same_logits(checkpoints.load(tmp_path / "out"), model)


def test_a_format_that_does_not_fit_is_refused(sources):
    wrong = scheme().model_copy(update={"format": "float-quantized"})
    with pytest.raises(BitpressError, match=r"format 'float-quantized' .*'pack-quantized'"):
        oneshot(sources(), None, QuantizationModifier(scheme=wrong))


@pytest.mark.parametrize(("bits", "packed"), [(2, True), (3, True), (4, False), (8, True)])
def test_layers_of_few_rows(bits, packed, tmp_path):
    # compressed-tensors 0.20 cannot unpack 4-bit zero points that are one row of words: those of 8 rows.
    model = oneshot(tiny.llama(num_attention_heads=8, num_key_value_heads=1), None, rtn(bits=bits))
    name = "model.layers.0.self_attn.k_proj"
    assert model.get_submodule(name).weight.shape == (8, 64)
    model.save_pretrained(tmp_path / "out")
    assert same_logits(loaded(tmp_path / "out"), model)
    assert (f"{name}.weight_packed" in tensors_of(tmp_path / "out")) == packed


def test_shards(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert same_logits(loaded(tmp_path / "out"), compressed)


def test_tied_embeddings(tmp_path, caplog):
    model = tiny.llama(tie_word_embeddings=True)
    oneshot(model, token_ids(), awq(ignore=()), num_calibration_samples=6)
    assert "lm_head shares its weight" in caplog.text
    model.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == ["lm_head"]
    assert same_logits(loaded(tmp_path / "out"), model)


# What is stored.


def test_the_config(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    weights = group["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["group_size"]) == (4, False, 32)
    assert (weights["type"], weights["strategy"], weights["dynamic"]) == ("int", "group", False)


def test_layers_that_are_left_alone_are_ignored_by_name(sources, tmp_path):
    model = oneshot(sources(), None, rtn(ignore=["re:.*layers.0.*", "lm_head"]))
    model.save_pretrained(tmp_path / "out")
    ignored = set(config_of(tmp_path / "out")["quantization_config"]["ignore"])
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert ignored == {n for n in linears if "layers.0" in n} | {"lm_head"}
    assert same_logits(loaded(tmp_path / "out"), model)


def test_the_recipes_pattern_is_kept(sources, tmp_path):
    model = oneshot(sources(), None, rtn(ignore=(), targets=["re:.*o_proj$"]))
    model.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["re:.*o_proj$"]
    assert config["ignore"] == []
    assert same_logits(loaded(tmp_path / "out"), model)


def test_it_is_small_and_safetensors_only(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    layers = quantized(compressed)
    packed = sum(t.nbytes for name, t in stored.items() if name.rpartition(".")[0] in layers)
    values = sum(layer.weight.numel() for layer in layers.values())
    # 4 bits a value; per 32 of them a float32 scale and a 4-bit zero point; a shape per layer.
    assert packed == values // 2 + values // 32 * 4 + values // 64 + 16 * len(layers)
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_conv1d_is_stored_dense_with_a_warning(sources, tmp_path, caplog):
    model = oneshot(sources("gpt2"), None, rtn(ignore=(), targets=["Conv1D"]))
    model.save_pretrained(tmp_path / "out")
    assert "Conv1D" in caplog.text
    assert "stored dense" in caplog.text
    assert "quantization_config" not in config_of(tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    for name, layer in quantized(model).items():
        assert torch.equal(stored[f"{name}.weight"], layer.weight)


def test_a_model_of_conv1d_and_linear_layers(tmp_path):
    model = oneshot(tiny.gpt2(tie_word_embeddings=False), None, rtn(ignore=(), targets=["Conv1D", "Linear"]))
    assert {type(m).__name__ for m in quantized(model).values()} == {"Conv1D", "Linear"}
    model.save_pretrained(tmp_path / "out")
    assert same_logits(loaded(tmp_path / "out"), model)
    assert [n for n in tensors_of(tmp_path / "out") if n.endswith("weight_packed")] == ["lm_head.weight_packed"]
    config = config_of(tmp_path / "out")["quantization_config"]
    assert (config["config_groups"]["group_0"]["targets"], config["ignore"]) == (["Linear"], [])


def test_dense_on_request(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "out", save_compressed=False)
    assert "quantization_config" not in config_of(tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    state = compressed.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    assert same_logits(loaded(tmp_path / "out"), compressed)


def test_companions(sources, tmp_path):
    recipe = rtn()
    model = oneshot(sources(), None, recipe, tokenizer=tokenizer())
    model.save_pretrained(tmp_path / "out")
    assert Recipe.of(tmp_path / "out" / "recipe.yaml") == Recipe.of(rtn())
    text = sentences(1)[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == tokenizer()(text).input_ids
    assert json.loads((tmp_path / "out" / "report.json").read_text())["quantized_layers"] == 14


# Whose weights are saved.


def test_a_copy_saves_its_own_weights(compressed, tmp_path):
    copied = copy.deepcopy(compressed)
    with torch.no_grad():
        copied.model.norm.weight.mul_(2)
    copied.save_pretrained(tmp_path / "copy")
    compressed.save_pretrained(tmp_path / "own")
    assert same_logits(loaded(tmp_path / "copy"), copied)
    assert same_logits(loaded(tmp_path / "own"), compressed)
    assert not same_logits(copied, compressed)


def test_weights_that_are_not_quantized_may_change(compressed, tmp_path):
    with torch.no_grad():
        compressed.lm_head.weight.add_(1)
    compressed.save_pretrained(tmp_path / "out")
    assert same_logits(loaded(tmp_path / "out"), compressed)


def _train(model):
    model.get_submodule(Q_PROJ).weight.data[3, 5] += 1e-3


def _replace(model):
    layer = model.get_submodule(Q_PROJ)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _cast(model):
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [_train, _replace, _cast])
def test_a_weight_that_was_changed_is_not_saved_as_quantized(change, compressed, tmp_path):
    change(compressed)
    with pytest.raises(BitpressError, match=rf"{Q_PROJ}\.weight is not what oneshot left"):
        compressed.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    compressed.save_pretrained(tmp_path / "out", save_compressed=False)
    assert same_logits(loaded(tmp_path / "out"), compressed) or change is _cast


@pytest.mark.parametrize("given", ["state dict", "none", "positional none"])
def test_a_state_dict_of_the_callers_is_packed_too(given, compressed, tmp_path):
    if given == "positional none":
        compressed.save_pretrained(tmp_path / "out", True, None)
    else:
        compressed.save_pretrained(tmp_path / "out", state_dict=compressed.state_dict() if given != "none" else None)
    assert same_logits(loaded(tmp_path / "out"), compressed)
    assert f"{Q_PROJ}.weight" not in tensors_of(tmp_path / "out")


def test_only_the_main_process_writes(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "out", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_what_is_pushed_is_the_compressed_checkpoint(compressed, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(compressed, "push_to_hub", lambda name, **_: pushed.append(name))
    compressed.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/mine")
    assert pushed == ["me/mine"]
    assert same_logits(loaded(tmp_path / "out"), compressed)


def test_a_model_that_transformers_loaded_compressed_is_its_to_save(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "out")
    back = loaded(tmp_path / "out")
    with pytest.raises(BitpressError, match="use its save_pretrained"):
        bitpress.save(back, tmp_path / "again")
    back.save_pretrained(tmp_path / "again")
    assert same_logits(loaded(tmp_path / "again"), compressed)


# Where it is saved.


def test_another_model_is_not_overwritten_unasked(compressed, sources, tmp_path):
    out = tmp_path / "out"
    sources("opt").save_pretrained(out, max_shard_size="60KB")
    (out / "notes.txt").write_text("mine")
    (out / "logs").mkdir()
    (out / "logs" / "a.log").write_text("mine too")
    before = contents(out)
    with pytest.raises(BitpressError, match=r"holds a model already .*overwrite=True"):
        compressed.save_pretrained(out)
    assert contents(out) == before
    compressed.save_pretrained(out, overwrite=True)
    assert same_logits(loaded(out), compressed)
    after = contents(out)
    assert (after["notes.txt"], after["logs/a.log"]) == (b"mine", b"mine too")
    assert [n for n in after if "safetensors" in n] == ["model.safetensors"]
    assert litter(tmp_path) == []


def test_twice_into_one_directory(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(BitpressError, match="holds a model already"):
        compressed.save_pretrained(tmp_path / "out")
    compressed.save_pretrained(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kept", ["model.safetensors", "pytorch_model.bin", "weights.gguf", "config.json"])
def test_what_counts_as_a_model(kept, compressed, tmp_path):
    (tmp_path / kept).write_text("{}")
    with pytest.raises(BitpressError, match=kept):
        compressed.save_pretrained(tmp_path)
    assert contents(tmp_path) == {kept: b"{}"}


def test_the_tokenizer_may_be_there_first(compressed, tmp_path):
    tokenizer().save_pretrained(tmp_path / "out")
    compressed.save_pretrained(tmp_path / "out")
    assert same_logits(loaded(tmp_path / "out"), compressed)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2").input_ids == tokenizer()("w1 w2").input_ids
    assert litter(tmp_path) == []


@pytest.mark.parametrize("where", ["file", "file/out"])
def test_a_file_is_no_directory(where, compressed, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BitpressError, match="is a file: give a directory"):
        compressed.save_pretrained(tmp_path / where)
    assert contents(tmp_path) == {"file": b"mine"}


def test_parents_are_made_and_modes_are_the_users(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "a" / "b" / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a/b/out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_a_link(compressed, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    compressed.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same_logits(loaded(tmp_path / "disk"), compressed)


def test_a_relative_path(compressed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compressed.save_pretrained("out")
    assert same_logits(loaded(tmp_path / "out"), compressed)


def test_no_room(compressed, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=directories.SPARE_BYTES + 50_000))
    with pytest.raises(BitpressError, match="no room on the disk"):
        compressed.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Whole or not at all.


class DiskError(OSError):
    pass


def _fail(*_, **__):
    raise DiskError(28, "No space left on device")


FAILURES = {
    "weights": (transformers_saving, "safe_save_file"),
    "companions": (saving, "write_companions"),
    "sync": (directories, "_sync"),
    "rename": (Path, "rename"),
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("place", FAILURES)
def test_a_save_that_fails_leaves_what_was_there(place, old, compressed, sources, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if old:
        sources("opt").save_pretrained(out)
        (out / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[place], _fail)
        with pytest.raises(DiskError):
            compressed.save_pretrained(out, overwrite=True)
    assert contents(tmp_path) == before
    assert out.exists() == old
    assert litter(tmp_path) == []
    compressed.save_pretrained(out, overwrite=True)
    assert same_logits(loaded(out), compressed)


@pytest.mark.parametrize("error", [DiskError, KeyboardInterrupt])
def test_a_swap_that_fails_puts_the_old_one_back(error, compressed, sources, tmp_path, monkeypatch):
    out = tmp_path / "out"
    sources("opt").save_pretrained(out)
    before = contents(tmp_path)
    rename = Path.rename

    def second_fails(self, target):
        if self.name.endswith(".partial"):
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", second_fails)
        with pytest.raises(error):
            compressed.save_pretrained(out, overwrite=True)
    assert contents(tmp_path) == before
    assert litter(tmp_path) == []


def test_a_plain_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = oneshot(tiny.MLP(32, 32), None, rtn(ignore=()))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", _fail)
        with pytest.raises(DiskError):
            bitpress.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_leaves_no_half_checkpoint(tmp_path):
    script = """
        import os, signal, sys
        import torch
        import bitpress
        from bitpress.checkpoints import saving
        from bitpress.modifiers import QuantizationModifier

        def write(tensors, file, metadata):
            file.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)

        model = torch.nn.Sequential(torch.nn.Linear(128, 128))
        bitpress.oneshot(model, None, QuantizationModifier(scheme="W4A16"))
        saving.save_file = write
        bitpress.save(model, sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert any(b"half a file" in data for data in contents(tmp_path).values())
    model = oneshot(nn.Sequential(nn.Linear(128, 128)), None, QuantizationModifier(scheme="W4A16"))
    bitpress.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


# Plain modules.


def test_options_of_transformers_are_not_for_plain_modules(tmp_path):
    model = oneshot(tiny.MLP(32, 32), None, rtn(ignore=()))
    with pytest.raises(BitpressError, match="overwrit"):
        bitpress.save(model, tmp_path / "out", overwrit=True)
    assert list(tmp_path.iterdir()) == []


def test_a_plain_module_is_packed_too(tmp_path):
    model = oneshot(tiny.MLP(64, 32, 16), None, rtn(ignore=(), bits=3, strategy=QuantizationStrategy.CHANNEL))
    bitpress.save(model, tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    kinds = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    assert set(stored) == {f"net.{i}.{kind}" for i in (0, 2) for kind in (*kinds, "bias")}
    assert stored["net.0.weight_packed"].shape == (32, words_a_row(64, 3))
    assert config_of(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]
    for i in (0, 2):
        own = {kind: stored[f"net.{i}.{kind}"] for kind in kinds}
        layer = model.net[i]
        unpacked = PackedQuantizationCompressor.decompress(own, layer.quantization_scheme)["weight"]
        assert torch.equal(unpacked, layer.weight)
