"""What an interrupted run has done is known, and nothing else passes for it."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress import BitpressError
from bitpress.checkpoints.directory import draft_of
from bitpress.checkpoints.journal import JOURNAL, LOCK, Journal, resumable_directory
from bitpress.checkpoints.layout import Layout, ShardWriter

FACTS = {"recipe": "steps: ...", "seed": 42, "model": {"a.safetensors": "4 bytes"}}
STATE = {f"{i}.weight": torch.arange(6.0).view(2, 3) + i for i in range(4)}


def recorded(draft, entries):
    journal = Journal.open(draft, FACTS)
    for block, entry in entries.items():
        journal.record(block, entry)
    journal.close()


def found(draft, facts=FACTS, **options):
    journal = Journal.open(draft, facts, **options)
    journal.close()
    return journal.entries


def blocks(count):
    return {f"block.{i}": {"figure": i / 3, "name": "é"} for i in range(count)}


def test_what_is_recorded_is_found(tmp_path):
    recorded(tmp_path, blocks(3))
    assert found(tmp_path) == blocks(3)
    recorded(tmp_path, {"block.1": {"figure": 7}, "more": {}})
    assert found(tmp_path) == {**blocks(3), "block.1": {"figure": 7}, "more": {}}


def test_a_block_that_is_called_as_a_field_is(tmp_path):
    recorded(tmp_path, {"facts": {"block": 1, "entry": 2}})
    assert found(tmp_path) == {"facts": {"block": 1, "entry": 2}}


@settings(deadline=None)
@given(st.data())
def test_a_torn_journal_holds_what_came_before(tmp_path_factory, data):
    draft = tmp_path_factory.mktemp("torn")
    recorded(draft, blocks(3))
    content = (draft / JOURNAL).read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    (draft / JOURNAL).write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    kept = blocks(max(0, whole - 1))
    assert found(draft) == kept
    recorded(draft, {"next": {}})
    assert found(draft) == {**kept, "next": {}}


@settings(deadline=None)
@given(st.data())
def test_a_damaged_line_is_left_out(tmp_path_factory, data):
    """Nothing passes for an entry that is none; whatever else is left is as it was."""
    draft = tmp_path_factory.mktemp("damaged")
    recorded(draft, blocks(3))
    content = bytearray((draft / JOURNAL).read_bytes())
    first = content.index(b"\n")
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (draft / JOURNAL).write_bytes(content)
    try:
        left = found(draft)
    except BitpressError as error:
        assert at <= first
        assert str(draft) in str(error)  # noqa: PT017
        assert "resume=False" in str(error)  # noqa: PT017
        return
    assert left.items() <= blocks(3).items()
    assert len(left) >= 1


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 43}, "its seed was 42, and is 43 now"),
        ({"model": {"a.safetensors": "5 bytes"}}, "its model of a.safetensors was 4 bytes, and is 5 bytes now"),
        ({"model": {}}, "its model of a.safetensors was 4 bytes, and is not stated now"),
        ({"threads": 2}, "its threads was not stated, and is 2 now"),
        ({"recipe": "x" * 1000}, f"and is {'x' * 60}... now"),
    ],
)
def test_another_run_is_refused(tmp_path, other, said):
    recorded(tmp_path, blocks(1))
    with pytest.raises(BitpressError, match="resume=False") as error:
        found(tmp_path, {**FACTS, **other})
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert found(tmp_path) == blocks(1)


def test_a_fact_that_json_changes_is_the_same(tmp_path):
    facts = {"shape": (1, 2), "by number": {1: "one"}}
    assert found(tmp_path, facts) == found(tmp_path, facts) == {}


def test_starting_over_clears_the_draft(tmp_path):
    recorded(tmp_path, blocks(2))
    (tmp_path / "model.safetensors").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    assert found(tmp_path, {"seed": 1}, resume=False) == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([JOURNAL, LOCK])
    assert found(tmp_path, {"seed": 1}) == {}


def test_a_second_process_is_refused(tmp_path):
    first = Journal.open(tmp_path, FACTS)
    with pytest.raises(BitpressError, match=rf"another process \({os.getpid()}\) is writing to {tmp_path}"):
        Journal.open(tmp_path, FACTS, resume=False)
    first.record("block", {})
    first.close()
    assert found(tmp_path) == {"block": {}}


def test_a_refused_run_lets_go_of_the_lock(tmp_path):
    recorded(tmp_path, blocks(1))
    with pytest.raises(BitpressError):
        found(tmp_path, {})
    assert found(tmp_path) == blocks(1)


def test_a_damaged_tensor_is_done_again(tmp_path, caplog):
    layout = Layout.of(STATE)
    with ShardWriter(tmp_path, layout) as writer:
        sums = {name: writer.write(name, tensor) for name, tensor in STATE.items()}
    names = list(STATE)
    recorded(tmp_path, {"first": {"checksums": {n: sums[n] for n in names[:2]}}, "second": {"checksums": sums}})
    place = layout.places[names[3]]
    with (tmp_path / place.file).open("r+b") as file:
        file.seek(place.start)
        file.write(b"\1")
    journal = Journal.open(tmp_path, FACTS)
    with ShardWriter(tmp_path, layout) as writer:
        assert list(journal.verify(writer)) == ["first"]
        assert writer.missing() == [names[3]]
    journal.close()
    assert f"{names[3]} is damaged" in caplog.text


# The directory


def written(path, facts=FACTS, fail_at=None, **options):
    """A run of four blocks; what it had to do."""
    done = []
    with resumable_directory(path, facts, **options) as (draft, journal), ShardWriter(draft, Layout.of(STATE)) as out:
        journal.verify(out)
        for name, tensor in STATE.items():
            if name in journal.entries:
                continue
            if name == fail_at:
                raise RuntimeError("interrupted")
            checksum = out.write(name, tensor)
            out.sync()
            journal.record(name, {"checksums": {name: checksum}})
            done.append(name)
    return done


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_a_whole_run_leaves_the_checkpoint_alone(tmp_path):
    assert written(tmp_path / "out") == list(STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert list(contents(tmp_path / "out")) == ["model.safetensors"]


def test_an_interrupted_run_goes_on(tmp_path):
    with pytest.raises(RuntimeError, match="interrupted"):
        written(tmp_path / "out", fail_at="2.weight")
    assert not (tmp_path / "out").exists()
    assert written(tmp_path / "out") == ["2.weight", "3.weight"]
    written(tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_run_that_did_nothing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="interrupted"):
        written(tmp_path / "out", fail_at="0.weight")
    assert not list(tmp_path.iterdir())


def test_a_run_that_starts_over_does_all(tmp_path):
    with pytest.raises(RuntimeError, match="interrupted"):
        written(tmp_path / "out", fail_at="2.weight")
    with pytest.raises(BitpressError, match="seed"):
        written(tmp_path / "out", {**FACTS, "seed": 1})
    assert written(tmp_path / "out", {**FACTS, "seed": 1}, resume=False) == list(STATE)


def test_a_model_that_is_there_is_replaced_and_the_rest_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    written(out)
    assert sorted(contents(out)) == ["model.safetensors", "notes.txt"]


def test_a_killed_run_goes_on(tmp_path):
    """By a kill that no code can answer, at several moments; the bytes are those of a run that was left alone."""
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import test_journal
        from pathlib import Path
        from bitpress.checkpoints import layout
        left = int(sys.argv[2])
        write = layout._write

        def killed(*args):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*args)

        layout._write = killed
        test_journal.written(Path(sys.argv[1]))
        """
    )
    written(tmp_path / "expected")
    for moment in (1, 3):
        out = tmp_path / f"out{moment}"
        ended = subprocess.run([sys.executable, "-c", program, str(out), str(moment)], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert not out.exists()
        assert draft_of(out).is_dir()
        done = written(out)
        assert done == list(STATE)[max(0, moment - 2) :]
        assert contents(out) == contents(tmp_path / "expected")


def test_the_error_of_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    def full(descriptor, memory):
        raise OSError(28, "No space left on device")

    journal = Journal.open(tmp_path, FACTS)
    journal.record("block", {})
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(BitpressError, match=rf"{re.escape(str(tmp_path / JOURNAL))} cannot be written to"):
            journal.record("more", {})
    journal.close()
    assert found(tmp_path) == {"block": {}}
