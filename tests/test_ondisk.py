"""From one checkpoint to another without a model: the files are those of the model in memory, byte for byte."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from compressing import awq, rtn, scheme, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitpress import BitpressError, oneshot
from bitpress.checkpoints.directory import draft_of
from bitpress.checkpoints.shards import INDEX, Shards
from bitpress.checkpoints.source import CannotStreamError
from bitpress.modifiers import QuantizationModifier
from bitpress.pipelines import tensors as by_tensors
from bitpress.quantization import QuantizationStrategy
from bitpress.session.streaming import StreamedSession
from bitpress.session.tensorwise import TensorwiseSession

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRESETS = ["W8A8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16"]
SMALL_SHARD = "60KB"


def source(folder, family="llama", dtype=torch.float32, shards="50GB", **options):
    path = folder / family
    getattr(tiny, family)(**options).to(dtype).save_pretrained(path, max_shard_size=shards)
    return path


def preset(name, ignore=("lm_head",), **fields):
    return [QuantizationModifier(scheme=name, targets=["Linear"], ignore=list(ignore), **fields)]


def contents(folder):
    """All files but what the clock decides, and what belongs to tokenizers that transformers makes up."""
    return {
        p.name: p.read_bytes()
        for p in Path(folder).iterdir()
        if p.name not in ("report.json", "report.html") and not p.name.startswith("tokenizer")
    }


def report_of(folder):
    return json.loads((Path(folder) / "report.json").read_text())


def on_disk(path, out, recipe, **options):
    """Tensor by tensor: block after block will not do."""
    with mock.patch.object(StreamedSession, "check", side_effect=AssertionError):
        model = oneshot(path, None, recipe, output_dir=out, stream=True, **options)
    assert all(p.is_meta for p in model.parameters())
    return model


def both(path, recipe, folder, **options):
    """The files of the two ways, and the reports."""
    on_disk(path, folder / "ours", recipe, **options)
    oneshot(path, None, recipe, output_dir=folder / "expected", stream=False, **options)
    assert contents(folder / "ours") == contents(folder / "expected")
    return report_of(folder / "ours"), report_of(folder / "expected")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_every_kind_of_grid(tmp_path, name, dtype):
    both(source(tmp_path, dtype=dtype), preset(name), tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "strategy", [QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR]
)
def test_every_width_of_integers(tmp_path, bits, strategy):
    both(source(tmp_path, dtype=torch.bfloat16), rtn(bits=bits, strategy=strategy), tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "opt", "gpt_neox", "bloom", "bert", "phi3"])
def test_families(tmp_path, family):
    """Tied embeddings, biases and fused projections among them."""
    both(source(tmp_path, family, torch.bfloat16), rtn(ignore=["lm_head", "embed_out"]), tmp_path)


def test_layers_that_are_stored_dense(tmp_path):
    """GPT-2's Conv1D, which no reader takes packed, beside a head that is."""
    path = source(tmp_path, "gpt2", tie_word_embeddings=False)
    groups = {"group_0": scheme(targets=["Linear", "Conv1D"])}
    both(path, [QuantizationModifier(config_groups=groups)], tmp_path)


def test_several_groups_of_mixed_formats(tmp_path):
    groups = {
        "attention": scheme(bits=8, symmetric=True, targets=[r"re:.*self_attn.*"]),
        "mlp": scheme(bits=4, targets=[r"re:.*mlp.*"]),
    }
    recipe = [QuantizationModifier(config_groups=groups), *preset("FP8_DYNAMIC", ignore=["re:.*layers.*"])]
    both(source(tmp_path, dtype=torch.bfloat16), recipe, tmp_path)


@pytest.mark.parametrize("observer", ["mse", "minmax"])
def test_observers(tmp_path, observer):
    group = scheme()
    group.weights.observer = observer
    both(source(tmp_path), [QuantizationModifier(config_groups={"group_0": group})], tmp_path)


def test_shards_with_an_index(tmp_path):
    path = source(tmp_path, dtype=torch.bfloat16, shards=SMALL_SHARD)
    assert len(Shards.of(path).files) > 2
    both(path, rtn(), tmp_path)


def test_a_checkpoint_in_another_dtype_than_its_config(tmp_path):
    path = source(tmp_path, dtype=torch.float32)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    both(path, rtn(), tmp_path)


def test_the_report(tmp_path):
    ours, expected = both(source(tmp_path), rtn(), tmp_path)
    assert ours.keys() == expected.keys()
    for name, layer in ours["layers"].items():
        of_memory = expected["layers"][name]
        assert layer.keys() == of_memory.keys()
        assert layer["weight_error"] == pytest.approx(of_memory["weight_error"], rel=0.5)
        assert {k: v for k, v in layer.items() if k != "weight_error"} == {
            k: v for k, v in of_memory.items() if k != "weight_error"
        }
    for field in ("pipeline", "weight_bytes_before", "weight_bytes_after", "quantized_layers", "versions"):
        assert ours[field] == expected[field]


def test_oneshot_goes_this_way(tmp_path):
    path = source(tmp_path)
    tokenizer().save_pretrained(path)
    model = oneshot(path, None, rtn(), output_dir=tmp_path / "ours")
    assert all(p.is_meta for p in model.parameters())
    oneshot(path, None, rtn(), output_dir=tmp_path / "expected", stream=False)
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = oneshot(AutoModelForCausalLM.from_pretrained(path), None, rtn())
    assert torch.equal(tiny.logits(loaded), tiny.logits(expected))


def test_shards_of_a_size(tmp_path):
    both(source(tmp_path, dtype=torch.bfloat16), rtn(), tmp_path, max_shard_size=SMALL_SHARD)
    assert len(Shards.of(tmp_path / "ours").files) > 1


def test_a_head_that_is_tied_is_quantized_as_in_memory(tmp_path):
    both(source(tmp_path, tie_word_embeddings=True), rtn(ignore=[]), tmp_path)


def test_a_mixture_whose_experts_stay_dense(tmp_path):
    """transformers joins its experts: they are read as it makes them."""
    path = tmp_path / "mixtral"
    ARCHITECTURES["mixtral"].build().save_pretrained(path)
    both(path, rtn(ignore=["lm_head", "re:.*experts.*"], group_size=16), tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_mixture_goes_block_after_block(tmp_path, name):
    path = tmp_path / name
    ARCHITECTURES[name].build().save_pretrained(path)
    recipe = rtn(group_size=16)
    with mock.patch.object(TensorwiseSession, "write_to", side_effect=AssertionError):
        model = oneshot(path, None, recipe, output_dir=tmp_path / "ours", stream=True)
    assert all(p.is_meta for p in model.parameters())
    oneshot(path, None, recipe, output_dir=tmp_path / "expected", stream=False)
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")


def test_what_no_module_claims_is_copied(tmp_path):
    path = source(tmp_path)
    more = {"model.layers.9.mtp.weight": torch.randn(3, 5), "extra": torch.arange(4)}
    save_file(load_file(path / "model.safetensors") | more, path / "model.safetensors", metadata={"format": "pt"})
    on_disk(path, tmp_path / "out", rtn())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in more.items())


# What transformers does not know


def of_names_alone(folder, known, **config):
    """A checkpoint that only its names tell of."""
    path = source(folder, known, torch.bfloat16, shards=SMALL_SHARD)
    (path / "config.json").write_text(json.dumps({"model_type": "made-up", "hidden_size": 64, **config}))
    (path / "notes.txt").write_text("ours")
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_unknown_architecture(tmp_path, family, caplog):
    """The tensors are those that it would have if it were known."""
    path = source(tmp_path / "known", family, torch.bfloat16)
    on_disk(path, tmp_path / "expected", rtn())
    with caplog.at_level(logging.INFO):
        on_disk(of_names_alone(tmp_path, family), tmp_path / "out", rtn())
    assert "14 weights are quantized by their names" in caplog.text
    assert "model.embed_tokens" in caplog.text
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    of_known = json.loads((tmp_path / "expected" / "config.json").read_text())
    assert config["quantization_config"] == of_known["quantization_config"]
    assert config["model_type"] == "made-up"
    assert (tmp_path / "out" / "notes.txt").read_text() == "ours"


def test_names_and_patterns_of_an_unknown_architecture(tmp_path):
    path = of_names_alone(tmp_path, "llama")
    (path / "config.json").unlink()
    groups = {"a": scheme(targets=["re:.*mlp.*", "model.layers.0.self_attn.o_proj"])}
    recipe = [QuantizationModifier(config_groups=groups, ignore=["re:.*layers.1.*"])]
    on_disk(path, tmp_path / "out", recipe)
    packed = {name.removesuffix(".weight_packed") for name in Shards.of(tmp_path / "out") if "packed" in name}
    mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert packed == {"model.layers.0.self_attn.o_proj", *mlp}


def test_an_unknown_architecture_cannot_be_calibrated(tmp_path):
    with pytest.raises(CannotStreamError, match="more than one weight at a time"):
        oneshot(of_names_alone(tmp_path, "llama"), None, awq(), output_dir=tmp_path / "out", stream=True)


def test_code_that_comes_with_a_checkpoint_is_not_guessed_around(tmp_path):
    path = Path(of_names_alone(tmp_path, "llama"))
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitpressError, match="cannot be loaded"):
        oneshot(path, None, rtn(), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What needs the model


def test_static_activations_need_data(tmp_path):
    with pytest.raises(BitpressError, match="no dataset was given"):
        oneshot(source(tmp_path), None, preset("FP8"), output_dir=tmp_path / "out")


def test_a_model_of_which_nothing_is_stored_packed_is_left_to_transformers(tmp_path):
    path = source(tmp_path, "gpt2")
    recipe = [QuantizationModifier(config_groups={"group_0": scheme(targets=["Conv1D"])})]
    with pytest.raises(CannotStreamError, match="packed"):
        oneshot(path, None, recipe, output_dir=tmp_path / "out", stream=True)
    model = oneshot(path, None, recipe, output_dir=tmp_path / "out", pipeline="datafree")
    assert not next(model.parameters()).is_meta
    assert (tmp_path / "out").is_dir()


def test_a_missing_tensor_is_left_to_transformers(tmp_path, caplog):
    path = source(tmp_path)
    state = load_file(path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO):
        model = oneshot(path, None, rtn(), output_dir=tmp_path / "out")
    assert "model.norm.weight" in caplog.text
    assert not next(model.parameters()).is_meta


def test_a_recipe_that_does_not_fit_is_refused_before_anything(tmp_path):
    path = source(tmp_path)
    with pytest.raises(BitpressError, match="group_size 48 does not divide"):
        oneshot(path, None, rtn(group_size=48), output_dir=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = source(tmp_path, shards=SMALL_SHARD)
    shard = Shards.of(path).files[1]
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(BitpressError, match=f"{shard.name} is damaged"):
        oneshot(path, None, rtn(), output_dir=tmp_path / "out", pipeline="datafree")
    shard.unlink()
    with pytest.raises(BitpressError, match=rf"{INDEX} says .*{shard.name} does not exist"):
        oneshot(path, None, rtn(), output_dir=tmp_path / "out", pipeline="datafree")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_values_that_are_not_finite_are_refused(tmp_path):
    path = source(tmp_path)
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitpressError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        oneshot(path, None, rtn(), output_dir=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


# Interrupts


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(by_tensors, "BETWEEN_LINES", 20_000)


@pytest.mark.usefixtures("small_groups")
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    path = source(tmp_path, shards=SMALL_SHARD)
    on_disk(path, tmp_path / "expected", rtn())
    solve, solved = by_tensors._solve, []

    def interrupted(*args):
        if len(solved) == 9:
            raise KeyboardInterrupt
        solved.append(args[2])
        return solve(*args)

    with monkeypatch.context() as patched:
        patched.setattr(by_tensors, "_solve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            on_disk(path, tmp_path / "out", rtn())
    assert not (tmp_path / "out").exists()
    again = []

    def seen(*args):
        again.append(args[2])
        return solve(*args)

    monkeypatch.setattr(by_tensors, "_solve", seen)
    with pytest.raises(BitpressError, match="its recipe was"):
        on_disk(path, tmp_path / "out", rtn(bits=8))
    on_disk(path, tmp_path / "out", rtn())
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert again
    assert not set(solved) <= set(again)
    assert report_of(tmp_path / "out")["layers"] == report_of(tmp_path / "expected")["layers"]


@pytest.mark.usefixtures("small_groups")
def test_a_damaged_draft_is_mended(tmp_path, monkeypatch):
    path = source(tmp_path)
    on_disk(path, tmp_path / "expected", rtn())
    leave = by_tensors._Workers.__exit__

    def fail(*args):
        leave(*args)
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(by_tensors._Workers, "__exit__", fail)
        with pytest.raises(ZeroDivisionError):
            on_disk(path, tmp_path / "out", rtn())
    file = draft_of(tmp_path / "out") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)
    on_disk(path, tmp_path / "out", rtn())
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_killed_run_goes_on(tmp_path):
    """By a kill that no code can answer, in the middle of a write."""
    path = source(tmp_path, shards=SMALL_SHARD)
    on_disk(path, tmp_path / "expected", rtn())
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from compressing import rtn
        from bitpress import oneshot
        from bitpress.pipelines import tensors
        tensors.BETWEEN_LINES = 20_000
        left = int(sys.argv[2])
        write = os.pwrite

        def killed(*args):
            global left
            left -= 1
            if left == 0:
                write(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args)

        os.pwrite = killed
        oneshot({str(path)!r}, None, rtn(), output_dir=sys.argv[1])
        """
    )
    for moment in (12, 60):
        out = tmp_path / f"out{moment}"
        ended = subprocess.run([sys.executable, "-c", program, str(out), str(moment)], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert not out.exists()
        on_disk(path, out, rtn())
        assert contents(out) == contents(tmp_path / "expected")


def test_a_disk_without_room_leaves_nothing(tmp_path, monkeypatch):
    """It fills up between the first look and the files' being laid out."""
    path = source(tmp_path)
    usage, looks = shutil.disk_usage(tmp_path), iter([1 << 30])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(looks, 9)))
    with pytest.raises(BitpressError, match="no room on the disk"):
        oneshot(path, None, rtn(), output_dir=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]
