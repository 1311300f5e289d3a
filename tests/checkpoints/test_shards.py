"""Reading: what safetensors wrote, bit for bit; what is damaged is an error that names the file."""

import json
import os
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from stored import assert_same, bits, state_dicts, tensor

from bitpress import BitpressError
from bitpress.checkpoints.headers import DTYPES
from bitpress.checkpoints.shards import Shards

STATE = {"a.weight": tensor([4, 6], torch.bfloat16), "b": tensor([3], torch.int64), "c": tensor([], torch.float32)}
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index."""
    names = {"a.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: STATE[name]}, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return tmp_path


def reindexed(folder, **changed):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changed
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, *said):
    with pytest.raises(BitpressError) as error:
        Shards.of(folder)
    for text in said:
        assert text in str(error.value)


@settings(deadline=None)
@given(state_dicts())
def test_reads_what_safetensors_wrote(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("one")
    save_file(state, folder / WHOLE, metadata={"format": "pt"})
    shards = Shards.of(folder)
    assert shards.keys() == state.keys()
    assert shards.metadata == {"format": "pt"}
    assert shards.nbytes == sum(t.nbytes for t in state.values())
    for name, expected in state.items():
        read = shards.read(name)
        assert_same(read, expected)
        assert (shards[name].meta().dtype, shards[name].meta().shape) == (expected.dtype, expected.shape)
        into = torch.empty_like(expected)
        assert shards.read(name, into) is into
        assert_same(into, expected)


def test_all_dtypes_are_those_of_safetensors(tmp_path):
    state = {kind: tensor([2, 3], dtype) for kind, dtype in DTYPES.items()}
    save_file(state, tmp_path / WHOLE)
    header = json.loads((tmp_path / WHOLE).read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert {kind: header[kind]["dtype"] for kind in state} == {kind: kind for kind in state}
    shards = Shards.of(tmp_path)
    for name, expected in state.items():
        assert_same(shards.read(name), expected)


def test_reads_into_memory_of_any_layout(sharded):
    into = torch.empty(6, 4, dtype=torch.bfloat16).T
    assert Shards.of(sharded).read("a.weight", into) is into
    assert_same(into, STATE["a.weight"])


@pytest.mark.parametrize("out", [torch.empty(4, 6), torch.empty(6, 4, dtype=torch.bfloat16)])
def test_memory_that_does_not_fit_is_refused(sharded, out):
    with pytest.raises(ValueError, match=re.escape("a.weight is torch.bfloat16 (4, 6)")):
        Shards.of(sharded).read("a.weight", out)


def test_a_tensor_is_of_its_own(sharded):
    shards = Shards.of(sharded)
    shards.read("a.weight").zero_()
    assert_same(shards.read("a.weight"), STATE["a.weight"])


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_with_and_without_an_index(sharded, with_index):
    if not with_index:
        (sharded / INDEX).unlink()
    shards = Shards.of(sharded)
    assert list(shards) == ["a.weight", "b"]
    assert [file.name[:11] for file in shards.files] == ["model-00001", "model-00002"]
    for name in shards:
        assert_same(shards.read(name), STATE[name])


def test_links_of_the_hubs_cache_are_followed(sharded, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert_same(Shards.of(snapshot).read("b"), STATE["b"])


# What is damaged


@settings(deadline=None)
@given(state_dicts(), st.data())
def test_a_file_that_was_cut_short_is_refused(tmp_path_factory, state, data):
    file = tmp_path_factory.mktemp("cut") / WHOLE
    content = save(state, metadata={"format": "pt"})
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refused(file.parent, str(file), "damaged")
    file.write_bytes(content + b"\0" * data.draw(st.integers(1, 9)))
    refused(file.parent, str(file), "damaged")


@settings(deadline=None)
@given(state_dicts(max_size=3), st.data())
def test_a_flipped_byte_of_the_header_cannot_move_bytes(tmp_path_factory, state, data):
    """It is found out, or it changed a word (a name, a dtype of the same size, the metadata) and no place."""
    file = tmp_path_factory.mktemp("flipped") / WHOLE
    content = bytearray(save(state, metadata={"format": "pt"}))
    length = 8 + int.from_bytes(content[:8], "little")
    at, byte = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 255))
    assume(content[at] != byte)
    content[at] = byte
    file.write_bytes(content)
    try:
        shards = Shards.of(file.parent)
    except BitpressError as error:
        assert str(file) in str(error)  # noqa: PT017
        return
    read = b"".join(bits(shards.read(name)) for name in shards)
    assert read == content[length:]
    assert len(shards) == len(state)
    assert sorted(t.nbytes for t in shards.values()) == sorted(t.nbytes for t in state.values())


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "does not fill its 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "has a gap before it"),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]},
            },
            "overlaps another",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "has no place"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "has no shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "has no shape"),
        ({"a": {"dtype": "F32", "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}}, "has no shape"),
        ({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, "'F33'"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "has a dtype that is not known"),
        ({"a": 1}, "says nothing of the tensor 'a'"),
        ({"__metadata__": {"format": 1}}, "metadata"),
        ([], "no mapping"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, header, said):
    text = json.dumps(header).encode()
    (tmp_path / WHOLE).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    refused(tmp_path, str(tmp_path / WHOLE), said)


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    info = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = b'{"a":' + info + b',"a":' + info + b"}"
    (tmp_path / WHOLE).write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    refused(tmp_path, str(tmp_path / WHOLE), "twice")


def test_a_header_of_brackets_is_refused(tmp_path):
    text = b"[" * 200_000
    (tmp_path / WHOLE).write_bytes(len(text).to_bytes(8, "little") + text)
    refused(tmp_path, str(tmp_path / WHOLE), "not JSON")


def test_a_file_that_changes_meanwhile_is_refused(sharded):
    shards = Shards.of(sharded)
    file = shards["a.weight"].file
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(BitpressError, match=rf"{re.escape(str(file))} has been changed"):
        shards.read("a.weight")
    file.unlink()
    with pytest.raises(BitpressError, match=rf"{re.escape(str(file))} cannot be read"):
        shards.read("a.weight")


def test_a_fact_of_other_files_is_another(sharded):
    facts = Shards.of(sharded).facts()
    assert Shards.of(sharded).facts() == facts
    save_file({"b": STATE["b"].view(1, 3)}, sharded / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    changed = Shards.of(sharded).facts()
    assert [name for name in facts if facts[name] != changed[name]] == ["model-00002-of-00002.safetensors"]


# The index


def test_an_index_that_names_a_missing_shard_is_refused(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, str(sharded / INDEX), "'b'", "model-00002-of-00002.safetensors does not exist")


def test_an_index_that_names_a_missing_tensor_is_refused(sharded):
    reindexed(sharded, lost="model-00001-of-00002.safetensors")
    refused(sharded, str(sharded / INDEX), "'lost'", "model-00001-of-00002.safetensors")


def test_an_index_that_names_another_shard_is_refused(sharded):
    reindexed(sharded, b="model-00001-of-00002.safetensors", **{"a.weight": "model-00002-of-00002.safetensors"})
    refused(sharded, str(sharded / INDEX), "of different checkpoints")


@pytest.mark.parametrize(
    "file", ["/etc/model.safetensors", "../model.safetensors", "a/../../b.safetensors", "C:\\a.safetensors", "..\\a"]
)
def test_an_index_that_leaves_its_directory_is_refused(sharded, file):
    reindexed(sharded, b=file)
    refused(sharded, str(sharded / INDEX), "outside its directory", "'b'")


@pytest.mark.parametrize("file", ["", "config.json", "pytorch_model.bin"])
def test_an_index_of_other_files_is_refused(sharded, file):
    reindexed(sharded, b=file)
    refused(sharded, str(sharded / INDEX), "'b'")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_an_index_that_is_none_is_refused(sharded, text):
    (sharded / INDEX).write_text(text, errors="surrogateescape")
    refused(sharded, str(sharded / INDEX))


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"a.weight": STATE["a.weight"], "b": STATE["b"]}, sharded / "model-00002-of-00002.safetensors")
    refused(sharded, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "'a.weight'")


def test_shards_that_are_not_all_there_are_refused(sharded):
    (sharded / INDEX).unlink()
    (sharded / "model-00001-of-00002.safetensors").unlink()
    refused(sharded, str(sharded), INDEX)


def test_pickled_weights_are_refused(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    refused(tmp_path, str(tmp_path), "pytorch_model.bin", "safetensors")


def test_no_checkpoint_at_all(tmp_path):
    refused(tmp_path, str(tmp_path), WHOLE)
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no directory")
