"""Ranks that are processes: they join, share, and fail together."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import TESTS, ended, started

from bitpress.ranks import ALONE, current, is_first, joined

TOGETHER = TESTS / "ranks" / "together.py"
FAILING = TESTS / "ranks" / "failing.py"
SOON = 60  # seconds: far from the half hour that torch would wait


def told(out):
    """The JSON of the last line."""
    assert out[0].strip(), out[1][-3000:]
    return json.loads(out[0].strip().splitlines()[-1])


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks is ALONE
        assert current() is ALONE
    assert is_first()


def test_ranks_of_torchrun_end_with_the_same_model_and_one_checkpoint(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [*launcher, str(TOGETHER), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["exchanged"] for row in rows] == ["all as expected"] * 2
    assert rows[0]["digests"] == rows[1]["digests"]
    assert all(row["own group kept"] for row in rows)
    # Each of the two ways of saving has left a model, whole.
    first = next(row for row in rows if "reloaded" in row)
    assert first["reloaded"] == first["digests"][0] == first["saved by itself"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["by itself", "out"]
    # Rank 0 says what both have to say, and what only the other has to say.
    assert done.stderr.count("say both") == 1
    assert done.stderr.count("says rank 1 alone") == 1


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_dies_ends_the_others_with_its_name(how):
    processes = started(FAILING, 3, how)
    assert processes[1].wait(timeout=300) != 0
    start = time.monotonic()
    outs = ended(processes)
    assert time.monotonic() - start < SOON
    assert (processes[1].returncode == -signal.SIGKILL) == (how == "kill")
    for rank in (0, 2):
        said = told(outs[rank])
        assert said["error"] == "RankError"
        assert "rank 1" in said["message"]
        assert how != "raise" or "ValueError: no such luck" in said["message"]
        assert said["model as it was"]


def test_the_rank_that_keeps_the_store_may_die_too():
    processes = started(FAILING, 2, "kill", 0)
    assert processes[0].wait(timeout=300) == -signal.SIGKILL
    start = time.monotonic()
    said = told(ended(processes)[1])
    assert time.monotonic() - start < SOON
    assert said["error"] == "RankError"
    assert "rank 0" in said["message"]
