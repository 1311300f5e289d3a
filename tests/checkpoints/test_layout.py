"""Files that are laid out first and filled in any order are those that transformers writes."""

import errno
import os
import random
import re
import shutil
from collections import namedtuple

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored import state_dicts, tensor

from bitpress import BitpressError
from bitpress.checkpoints import layout as layouts
from bitpress.checkpoints.layout import Layout, ShardWriter
from bitpress.checkpoints.shards import Shards

MODEL = tiny.llama()
STATE = {
    "a.weight": tensor([4, 6], torch.bfloat16),
    "b": tensor([3], torch.int64, 1),
    "empty": tensor([0, 2], torch.float32),
    "scalar": tensor([], torch.float8_e4m3fn, 2),
}


@pytest.fixture
def laid():
    return Layout.of(meta(STATE), max_shard_size=50)


def meta(state):
    return {name: t.to("meta") for name, t in state.items()}


def contents(folder):
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    return {name: text for name, text in found.items() if ".safetensors" in name}


def filled(folder, layout, state, order):
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, layout) as writer:
        sums = {name: writer.write(name, state[name]) for name in order}
        writer.sync()
    return sums


@settings(deadline=None)
@given(state_dicts(min_size=0), st.randoms())
def test_one_file_is_that_of_safetensors(tmp_path_factory, state, draw):
    folder = tmp_path_factory.mktemp("one")
    layout = Layout.of(meta(state))
    order = list(state)
    draw.shuffle(order)
    filled(folder, layout, state, order)
    if not state:
        assert not contents(folder)
        return
    save_file(state, folder / "expected.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (folder / "expected.safetensors").read_bytes()
    assert layout.nbytes == (folder / "expected.safetensors").stat().st_size


@settings(deadline=None)
@given(state_dicts(), st.one_of(st.integers(1, 300), st.sampled_from(["0.1KB", "1KB", "5MB"])))
def test_shards_and_index_are_those_of_transformers(tmp_path_factory, state, size):
    folder = tmp_path_factory.mktemp("shards")
    options = {"max_shard_size": size, "save_original_format": False}
    MODEL.save_pretrained(folder / "expected", state_dict=dict(state), **options)
    layout = Layout.of(meta(state), max_shard_size=size, total_parameters=MODEL.num_parameters())
    filled(folder / "ours", layout, state, state)
    assert contents(folder / "ours") == contents(folder / "expected")


def test_a_model_is_that_of_transformers(tmp_path):
    """With its own default, too."""
    state = MODEL.state_dict()
    MODEL.save_pretrained(tmp_path / "expected")
    filled(tmp_path / "ours", Layout.of(meta(state)), state, sorted(state))
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")


def test_tensors_of_any_layout(tmp_path):
    weight = tensor([6, 4], torch.float16)
    filled(tmp_path, Layout.of({"a": weight.T.to("meta")}), {"a": weight.T}, ["a"])
    assert torch.equal(Shards.of(tmp_path).read("a").view(torch.int16), weight.T.contiguous().view(torch.int16))


@pytest.mark.parametrize("wrong", [torch.zeros(4, 6), torch.zeros(6, 4, dtype=torch.bfloat16)])
def test_another_tensor_is_refused(tmp_path, laid, wrong):
    with ShardWriter(tmp_path, laid) as writer, pytest.raises(ValueError, match=r"a\.weight is torch"):
        writer.write("a.weight", wrong)


def test_what_is_missing_is_known(tmp_path, laid):
    with ShardWriter(tmp_path, laid) as writer:
        assert sorted(writer.missing()) == sorted(STATE)
        writer.write("b", STATE["b"])
        assert sorted(writer.missing()) == sorted(STATE.keys() - {"b"})


def test_an_interrupted_run_goes_on(tmp_path, laid):
    expected, ours = tmp_path / "expected", tmp_path / "ours"
    filled(expected, laid, STATE, STATE)
    sums = filled(ours, laid, STATE, ["b", "scalar"])
    with ShardWriter(ours, laid) as writer:
        assert all(writer.verify(name, checksum) for name, checksum in sums.items())
        assert sorted(writer.missing()) == ["a.weight", "empty"]
        assert not writer.verify("a.weight", sums["b"])
        for name in writer.missing():
            writer.write(name, STATE[name])
        assert not writer.missing()
    assert contents(ours) == contents(expected)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_byte_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    layout = Layout.of(meta(STATE))
    sums = filled(folder, layout, STATE, STATE)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(len(layout.headers[file.name]), len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with ShardWriter(folder, layout) as writer:
        damaged = [name for name, checksum in sums.items() if not writer.verify(name, checksum)]
    hit = [name for name, p in layout.places.items() if p.start <= at < p.start + p.nbytes]
    assert damaged == hit


@pytest.mark.parametrize("left", ["shorter", "other header", "none"])
def test_files_of_another_layout_are_replaced(tmp_path, laid, left):
    sums = filled(tmp_path, laid, STATE, STATE)
    file = next(iter(laid.sizes))
    content = bytearray((tmp_path / file).read_bytes())
    if left == "shorter":
        (tmp_path / file).write_bytes(content[:-1])
    elif left == "other header":
        content[9] ^= 1
        (tmp_path / file).write_bytes(content)
    else:
        (tmp_path / file).unlink()
    with ShardWriter(tmp_path, laid) as writer:
        lost = [name for name, checksum in sums.items() if not writer.verify(name, checksum)]
        # Bytes of zero would have the checksum that zeros have; these have none.
        assert lost == [name for name, p in laid.places.items() if str(p.file) == file and p.nbytes]
        for name in lost:
            writer.write(name, STATE[name])
    filled(tmp_path / "expected", laid, STATE, STATE)
    assert contents(tmp_path) == contents(tmp_path / "expected")


# Disks


def test_a_disk_without_room_is_refused_at_once(tmp_path, laid, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(BitpressError, match=rf"no room on the disk: {re.escape(str(tmp_path))}/model-00001"):
        ShardWriter(tmp_path, laid)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path, laid, monkeypatch):
    """The second file has no room any more."""
    allocate, calls = os.posix_fallocate, []

    def full(descriptor, start, size):
        calls.append(size)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BitpressError, match=r"no room on the disk: .*model-00002"):
        ShardWriter(tmp_path, laid)
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_sets_nothing_aside(tmp_path, laid, monkeypatch):
    def unknown(descriptor, start, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    filled(tmp_path / "expected", laid, STATE, STATE)
    monkeypatch.setattr(os, "posix_fallocate", unknown)
    filled(tmp_path / "ours", laid, STATE, STATE)
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")


def test_a_disk_that_fails_is_named(tmp_path, laid, monkeypatch):
    with ShardWriter(tmp_path, laid) as writer:

        def fails(descriptor, data, start):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pwrite", fails)
        with pytest.raises(BitpressError, match=rf"{laid.places['b'].file} cannot be written to: Input/output error"):
            writer.write("b", STATE["b"])
        assert "b" in writer.missing()


def test_a_kernel_that_writes_little_at_once(tmp_path, laid, monkeypatch):
    filled(tmp_path / "expected", laid, STATE, STATE)
    write, draw = os.pwrite, random.Random(0)  # noqa: S311
    monkeypatch.setattr(os, "pwrite", lambda d, data, start: write(d, data[: draw.randint(1, 5)], start))
    monkeypatch.setattr(layouts, "_PIECE", 16)
    filled(tmp_path / "ours", laid, STATE, STATE)
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")


# What cannot be laid out


def test_dtypes_that_safetensors_lacks_are_refused():
    with pytest.raises(BitpressError, match=r"a is torch\.complex128"):
        Layout.of({"a": torch.zeros(2, dtype=torch.complex128)})


def test_a_size_that_is_none_is_refused():
    with pytest.raises(BitpressError, match="max_shard_size '5 apples'"):
        Layout.of(STATE, max_shard_size="5 apples")
