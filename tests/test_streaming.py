"""A model that stays on the disk: the checkpoint is that of the model in memory, byte for byte, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import llama, mistral
from torch import nn
from transformers import AutoModelForCausalLM

import bitpress
from bitpress import AWQModifier, BitpressError, DistillationModifier, GPTQModifier, Modifier, QuantizationModifier
from bitpress.checkpoints.source import CannotStreamError, open_source
from bitpress.models.blocks import Call
from bitpress.models.residence import Residence
from bitpress.modifiers import State
from bitpress.pipelines.spilling import Spill, hidden_state, make_spill
from bitpress.quantization import QuantizationArgs, QuantizationScheme

# transformers does not know the one, and makes up weights of the other.
CANNOT = ("baichuan", "marian")
LIKE_PEERS = ("llama4", "mixtral", "qwen3_moe", "gpt_oss", "gemma3", "qwen2_5_vl", "deepseek_v3", "bert_generation")


def four_bits(**more):
    weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=16)
    return {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights, **more)}}


def tokens(rows=6, length=24, vocabulary=128):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(3)).tolist()


def stored(model, path, dtype=None, **options):
    model.to(dtype).save_pretrained(path, **options)
    return str(path)


# What the clock decides.
TIMED = ("report.json", "report.html")


def files(path, *but):
    return {f.name: f.read_bytes() for f in sorted(Path(path).iterdir()) if f.name not in but}


def report(path):
    found = json.loads((Path(path) / "report.json").read_text())
    del found["seconds"], found["resident_bytes"]
    return found


def both_ways(source, tmp_path, recipe, data, **options):
    """The two checkpoints' files must be the same; that of the streamed run is returned."""
    for stream in (True, False):
        path = tmp_path / f"stream-{stream}"
        bitpress.oneshot(source, data, recipe(), output_dir=path, stream=stream, progress=False, **options)
    streamed, loaded = tmp_path / "stream-True", tmp_path / "stream-False"
    assert files(streamed, *TIMED) == files(loaded, *TIMED)
    assert report(streamed) == report(loaded)
    return streamed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_are_those_of_the_model_in_memory(tmp_path, tied, dtype):
    source = stored(llama(tie_word_embeddings=tied), tmp_path / "model", dtype, max_shard_size="40KB")
    out = both_ways(
        source,
        tmp_path,
        lambda: [AWQModifier(), GPTQModifier(**four_bits(), ignore=["lm_head"])],
        tokens(),
        max_shard_size="30KB",
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    logits = AutoModelForCausalLM.from_pretrained(out)(torch.tensor(tokens())).logits
    assert torch.equal(logits, bitpress.load(out, packed=False)(torch.tensor(tokens())).logits)


def test_what_is_returned_says_where_the_weights_are(tmp_path):
    recipe = [GPTQModifier(**four_bits(), ignore=["lm_head"])]
    source = stored(llama(), tmp_path / "model")
    model = bitpress.oneshot(source, tokens(), recipe, output_dir=tmp_path / "out", progress=False)
    assert model.bitpress.report["quantized_layers"] == 14
    for use in (lambda: model(torch.tensor(tokens())), lambda: model.save_pretrained(tmp_path / "again")):
        with pytest.raises(BitpressError, match=r"bitpress\.load\(.*out"):
            use()


def test_static_activations_and_a_quantized_cache(tmp_path):
    static = QuantizationArgs(num_bits=8, symmetric=True, strategy="tensor", dynamic=False)
    recipe = lambda: [  # noqa: E731
        QuantizationModifier(
            **four_bits(input_activations=static), kv_cache_scheme=static.model_copy(), ignore=["lm_head"]
        )
    ]
    both_ways(stored(llama(), tmp_path / "model"), tmp_path, recipe, tokens())


@pytest.mark.parametrize("observer", ["gram", "imatrix_mse"])
def test_observers_that_need_data_have_it(tmp_path, observer):
    def recipe(**more):
        weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=16, **more)
        groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
        return [QuantizationModifier(config_groups=groups, ignore=["lm_head"])]

    source = stored(llama(), tmp_path / "model")
    out = both_ways(source, tmp_path, lambda: recipe(observer=observer), tokens())
    bitpress.oneshot(source, None, recipe(), output_dir=tmp_path / "without", progress=False)
    assert files(out, *TIMED) != files(tmp_path / "without", *TIMED)
    with pytest.raises(BitpressError, match="no dataset was given"):
        bitpress.oneshot(source, None, recipe(observer=observer), output_dir=tmp_path / "no", progress=False)


def test_a_quantized_head_is_a_block_of_its_own(tmp_path):
    both_ways(stored(llama(), tmp_path / "model"), tmp_path, lambda: [GPTQModifier(**four_bits())], tokens())


def test_activations_on_the_disk_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("bitpress.pipelines.spilling.LEAST_BYTES", 1)
    emptied = []
    out = Spill.out

    def watched(self, index, storages):
        out(self, index, storages)
        emptied.extend(storage.nbytes() for storage, _, _ in self._out.get(index, ()))

    monkeypatch.setattr(Spill, "out", watched)
    source = stored(llama(), tmp_path / "model")
    recipe = lambda: [GPTQModifier(**four_bits(), ignore=["lm_head"], error_correction=0.5)]  # noqa: E731
    for where in ("disk", "memory"):
        bitpress.oneshot(source, tokens(), recipe(), output_dir=tmp_path / where, activations=where, progress=False)
    assert emptied
    assert not any(emptied)
    assert files(tmp_path / "disk", *TIMED) == files(tmp_path / "memory", *TIMED)


@pytest.mark.parametrize("name", LIKE_PEERS)
def test_architectures(name, tmp_path):
    architecture = ARCHITECTURES[name]
    source = stored(architecture.build(), tmp_path / "model")
    data = [architecture.inputs(1, 24, seed) for seed in range(3)]
    both_ways(source, tmp_path, lambda: [GPTQModifier(**four_bits(), ignore=["lm_head"])], data)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in LIKE_PEERS else [pytest.mark.slow]) for n in ARCHITECTURES]
)
def test_a_source_reads_what_transformers_loads(name, tmp_path):
    model = ARCHITECTURES[name].build()
    if not hasattr(model, "save_pretrained"):
        pytest.skip("it is no transformers model")
    model.save_pretrained(tmp_path)
    try:
        source = open_source(tmp_path)
    except CannotStreamError:
        assert name in CANNOT
        return
    assert name not in CANNOT
    loaded = type(model).from_pretrained(tmp_path)
    names = [n for n, _ in loaded.named_parameters(remove_duplicate=False)]
    read = source.read(names)
    for each in names:
        parameter = loaded.get_parameter(each)
        assert read[each].dtype == parameter.dtype
        assert torch.equal(read[each], parameter), each
    buffers = dict(source.model.named_buffers())
    for each, buffer in loaded.named_buffers():
        assert torch.equal(buffers[each], buffer), each
    assert source.model.config.to_dict() == loaded.config.to_dict()


def test_only_a_block_is_in_memory(tmp_path):
    source = open_source(stored(llama(num_hidden_layers=3), tmp_path / "model"))
    residence = Residence(source.model, source.read)

    def there():
        return {n for n, p in source.model.named_parameters() if not p.is_meta}

    blocks = {f"model.layers.{i}" for i in range(3)}
    with residence.around(blocks):
        assert there() == {"model.embed_tokens.weight"}
        with residence.present("model.layers.1"):
            assert there() == {n for n, _ in source.model.named_parameters() if n.startswith("model.layers.1.")}
            with residence.present("model.layers.1"):
                pass
            assert there()
        assert not there()
        source.model.model.norm(torch.ones(1, 64))
        assert there() == {"model.norm.weight"}
    assert not there()


def test_what_no_module_claims_is_copied(tmp_path):
    source = Path(stored(llama(), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    more = {"model.layers.9.mtp.weight": torch.randn(3, 5), "extra": torch.arange(4)}
    save_file(tensors | more, source / "model.safetensors", metadata={"format": "pt"})
    recipe = [QuantizationModifier(**four_bits(), ignore=["lm_head"]), Listening()]
    bitpress.oneshot(str(source), tokens(), recipe, output_dir=tmp_path / "out", stream=True, progress=False)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as found:
        for name, tensor in more.items():
            assert torch.equal(found.get_tensor(name), tensor)


class Listening(Modifier):
    """Asks for statistics, so that the model is run; ends the run at a block, if it is told to."""

    end_at: str = ""
    end_by: str = "error"

    def required_statistics(self, state, name):
        from bitpress.statistics import Statistic

        return Statistic.MEAN_MAGNITUDE

    def on_solved(self, state, block):
        if block.name == self.end_at:
            if self.end_by == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def interruptible(model, out, end_at="", **options):
    recipe = [AWQModifier(), GPTQModifier(**four_bits(), ignore=["lm_head"]), Listening()]
    recipe[-1].__dict__["end_at"] = end_at  # not a part of the recipe's text
    return bitpress.oneshot(model, tokens(), recipe, output_dir=out, stream=True, progress=False, **options)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interrupted_run_goes_on(tmp_path, at, caplog):
    model = stored(mistral(num_hidden_layers=4), tmp_path / "model")
    interruptible(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        interruptible(model, tmp_path / "out", end_at=f"model.layers.{at}")
    assert not (tmp_path / "out").exists()
    solved = []
    solve = GPTQModifier.on_block
    try:
        GPTQModifier.on_block = lambda self, state, block: (solved.append(block.name), solve(self, state, block))[1]
        interruptible(model, tmp_path / "out")
    finally:
        GPTQModifier.on_block = solve
    assert solved == [f"model.layers.{i}" for i in range(at, 4)]
    assert files(tmp_path / "out", *TIMED) == files(tmp_path / "whole", *TIMED)
    assert report(tmp_path / "out") == report(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "whole"]


def test_another_run_does_not_go_on(tmp_path):
    model = stored(mistral(), tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        interruptible(model, tmp_path / "out", end_at="model.layers.1")
    with pytest.raises(BitpressError, match=r"its seed was 42, and is 1 now.*resume=False"):
        interruptible(model, tmp_path / "out", seed=1)
    interruptible(model, tmp_path / "out", seed=1, resume=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
from test_streaming import interruptible
interruptible(sys.argv[1], sys.argv[2])
"""


def start(model, out):
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", script, model, str(out)], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """Each at a moment of its own, the next run going on where the last was."""
    model = stored(mistral(num_hidden_layers=8), tmp_path / "model")
    begun = time.monotonic()
    assert start(model, tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - begun
    generator = torch.Generator().manual_seed(0)
    kills = tries = 0
    while kills < 20:
        out = tmp_path / f"out-{tries}"
        tries += 1
        while True:
            process = start(model, out)
            try:
                # Most of the time goes by before the first block.
                process.wait(seconds * (0.5 + 0.5 * float(torch.rand((), generator=generator))))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        assert files(out, *TIMED) == files(tmp_path / "whole", *TIMED)


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path):
    model = stored(mistral(), tmp_path / "model")
    process = start(model, tmp_path / "out")
    while process.poll() is None and not list(tmp_path.glob(".out.partial/*.safetensors")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    interruptible(model, tmp_path / "out")
    interruptible(model, tmp_path / "whole")
    assert files(tmp_path / "out", *TIMED) == files(tmp_path / "whole", *TIMED)


def test_not_a_number_is_refused_before_anything_is_solved(tmp_path):
    model = llama(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = float("nan")
    source = stored(model, tmp_path / "model")
    with pytest.raises(BitpressError, match=r"model\.layers\.2\.mlp\.down_proj"):
        interruptible(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_needs_the_whole_model_loads_it(tmp_path, caplog):
    source = stored(llama(), tmp_path / "model")
    recipe = lambda: [GPTQModifier(**four_bits(), ignore=["lm_head"]), DistillationModifier()]  # noqa: E731
    with pytest.raises(CannotStreamError, match="DistillationModifier needs all of the model"):
        bitpress.oneshot(source, tokens(), recipe(), output_dir=tmp_path / "out", stream=True)
    model = bitpress.oneshot(source, tokens(), recipe(), output_dir=tmp_path / "out", progress=False)
    assert not any(p.is_meta for p in model.parameters())
    with pytest.raises(BitpressError, match="stream=True needs the path"):
        bitpress.oneshot(nn.Linear(4, 4), None, recipe(), output_dir=tmp_path / "x", stream=True)


def test_too_little_memory_is_refused_with_the_way_out(tmp_path, monkeypatch):
    source = stored(llama(), tmp_path / "model")
    monkeypatch.setattr("bitpress.session.preflight.free_memory", lambda _: 1000)
    with pytest.raises(BitpressError, match=r"are free .*: .*(sequential_targets|activations)"):
        interruptible(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_what_is_there(tmp_path):
    source = stored(llama(num_hidden_layers=2), tmp_path / "model", torch.bfloat16)
    needs = bitpress.plan(source, "w4a16-balanced", recipe_args={"group_size": 32}, num_calibration_samples=4)
    block = llama().model.layers[0]
    assert needs.memory["the largest block"] == 2 * sum(p.numel() for p in block.parameters())
    assert needs.memory["activations of all batches"] == 4 * 2048 * 64 * 2
    assert needs.layers == 14
    out = tmp_path / "out"
    recipe_args = {"group_size": 32}
    bitpress.oneshot(source, tokens(), "w4a16-balanced", recipe_args=recipe_args, output_dir=out, progress=False)
    assert needs.disk == (out / "model.safetensors").stat().st_size


@pytest.mark.parametrize("stream", [True, False])
def test_what_it_needs_is_said_before_it_begins(stream, tmp_path, caplog):
    source, said = stored(llama(), tmp_path / "model"), []

    class Watching(GPTQModifier):
        def on_block(self, state, block):
            said.extend(caplog.messages)
            super().on_block(state, block)

    with caplog.at_level("INFO", logger="bitpress"):
        recipe = Watching(**four_bits(), ignore=["lm_head"])
        bitpress.oneshot(source, tokens(), recipe, output_dir=tmp_path / "out", stream=stream, progress=False)
    assert any("memory at most" in message for message in said)
    assert any("disk, for the checkpoint" in message for message in said) == stream


def test_what_a_recipe_without_data_needs(tmp_path, caplog):
    source = stored(llama(), tmp_path / "model")
    needs = bitpress.plan(source, QuantizationModifier(**four_bits(), ignore=["lm_head"]))
    assert list(needs.memory) == ["the tensors at work"]
    assert needs.peak > needs.held
    with caplog.at_level("INFO", logger="bitpress"):
        bitpress.oneshot(
            source, None, QuantizationModifier(**four_bits(), ignore=["lm_head"]), output_dir=tmp_path / "out",
            progress=False,
        )  # fmt: skip
    assert needs.disk == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert any("tensors at work" in message for message in caplog.messages)


@given(rows=st.integers(2, 40), columns=st.integers(1, 40), half=st.booleans(), on_disk=st.booleans())
def test_spilled_tensors_come_back_as_they_were(tmp_path_factory, rows, columns, half, on_disk):
    hidden = torch.randn(rows, columns).to(torch.bfloat16 if half else torch.float32)
    before, seen = hidden.clone(), hidden[1:]
    call = Call((hidden, torch.ones(3, 3)), {})
    from bitpress.pipelines import spilling

    least, spilling.LEAST_BYTES = spilling.LEAST_BYTES, 1
    try:
        spill = Spill(tmp_path_factory.getbasetemp() if on_disk else None)
        spill.out(0, hidden_state(call, None))
        assert hidden.untyped_storage().nbytes() == 0
        spill.back(0)
    finally:
        spilling.LEAST_BYTES = least
    assert torch.equal(hidden, before)
    assert torch.equal(seen, before[1:])
    assert torch.equal(call.args[1], torch.ones(3, 3))
    spill.close()


class Held:
    """As much of a storage as says where it is, and how large."""

    def __init__(self, device, nbytes):
        self.device, self._nbytes = torch.device(device), nbytes

    def nbytes(self):
        return self._nbytes


@pytest.mark.parametrize(
    ("on", "device", "stated", "goes_to"),
    [
        ("cpu", 10_000, None, None),
        ("cpu", 300, None, "disk"),
        ("cpu", 300, "memory", None),
        ("cpu", 10_000, "disk", "disk"),
        ("cuda:1", 10_000, None, None),
        ("cuda:1", 300, None, "host"),
        ("cuda:1", 300, "memory", "host"),
        ("cuda:1", 10_000, "memory", None),
        ("cuda:1", 10_000, "disk", "disk"),
    ],
)
def test_activations_go_where_there_is_room(on, device, stated, goes_to, tmp_path, monkeypatch):
    free = {on: device, **({} if on == "cpu" else {"cpu": 10_000})}
    monkeypatch.setattr("bitpress.pipelines.spilling.free_memory", lambda place: free[str(place)])
    state = State(nn.Linear(2, 2), {}, {}, [], activations_on=stated, scratch=tmp_path)
    spill = make_spill(state, [Held(on, 100)], 4)
    assert (None if spill is None else "host" if spill._directory is None else "disk") == goes_to


def test_activations_that_no_memory_has_room_for_go_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("bitpress.pipelines.spilling.free_memory", lambda _: 1000)
    state = State(nn.Linear(2, 2), {}, {}, [], scratch=tmp_path)
    assert make_spill(state, [Held("cuda:0", 100)], 4)._directory == tmp_path


def test_blocks_are_read_ahead_by_another_thread(tmp_path, monkeypatch):
    source = stored(llama(), tmp_path / "model")
    asked, threads = [], set()

    class Ahead(Residence):
        def __init__(self, model, read, device, _):
            super().__init__(model, read, device, self.read_ahead)

        def read_ahead(self, names):
            threads.add(threading.current_thread())
            asked.append({name.split(".")[2] for name in names})
            return self._read(names)

    recipe = lambda: [AWQModifier(), QuantizationModifier(**four_bits(), ignore=["lm_head"])]  # noqa: E731
    bitpress.oneshot(source, tokens(), recipe(), output_dir=tmp_path / "plain", progress=False)
    monkeypatch.setattr("bitpress.session.streaming.Residence", Ahead)
    bitpress.oneshot(source, tokens(), recipe(), output_dir=tmp_path / "ahead", progress=False)
    assert files(tmp_path / "ahead", *TIMED) == files(tmp_path / "plain", *TIMED)
    assert threading.main_thread() not in threads
    assert {"0"} in asked
    assert {"1"} in asked


def test_what_a_thread_fails_to_read_ahead_is_said(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"))

    def fail(_):
        raise BitpressError("the disk is gone")

    residence = Residence(
        model, lambda names: {n: torch.zeros(model.get_parameter(n).shape) for n in names}, "cpu", fail
    )
    residence.expect(["0", "1"])
    with residence.present("0"):
        assert not model[0].weight.is_meta
    with pytest.raises(BitpressError, match="disk is gone"), residence.present("1"):
        pass


@pytest.mark.parametrize(
    ("device", "says"),
    [("cuda:99", "cannot be used here"), ("gpu", "cannot be used here"), ("meta", "computes nothing")],
)
def test_a_device_that_is_not_there(device, says, tmp_path):
    source = stored(llama(), tmp_path / "model")
    with pytest.raises(BitpressError, match=says):
        bitpress.oneshot(source, tokens(), "w4a16-fast", output_dir=tmp_path / "out", device=device)
    with pytest.raises(BitpressError, match=says):
        bitpress.plan(source, "w4a16-fast", device=device)


def test_a_module_is_computed_where_it_is():
    with pytest.raises(BitpressError, match="move the module"):
        bitpress.oneshot(llama(), tokens(), "w4a16-fast", device="cpu")


def test_what_others_may_hold_stays_in_memory():
    hidden, other = torch.randn(200, 200), torch.randn(200, 200)
    assert hidden_state(Call((hidden,), {}), (hidden,))
    assert not hidden_state(Call((hidden,), {}), (other,)), "the model has made it of the block's output"
    assert not hidden_state(Call((torch.arange(50_000).view(5, -1),), {}), None)
