"""Several processes compress a model on the disk: the first writes, all read, and a kill of all is no loss."""

from pathlib import Path

import pytest
import tiny
import torch
from processes import ended, started
from transformers import AutoModelForCausalLM

import bitpress

STREAMED = Path(__file__).with_name("streamed.py")


def files(path):
    timed = ("report.json", "report.html")
    return {f.name: f.read_bytes() for f in sorted(path.iterdir()) if f.name not in timed}


@torch.no_grad()
def logits(path):
    compressed = (path / "recipe.yaml").exists()
    model = bitpress.load(path, packed=False) if compressed else AutoModelForCausalLM.from_pretrained(path)
    return model(**tiny.tokens(4, seed=9)).logits


@pytest.fixture
def run(tmp_path):
    tiny.llama(num_hidden_layers=4).save_pretrained(tmp_path / "model")

    def run(out, end_at="", size=2):
        processes = started(STREAMED, size, tmp_path / "model", tmp_path / out, end_at)
        printed = ended(processes)
        return [p.returncode for p in processes], printed

    return run


def test_one_rank_goes_from_tensor_to_tensor_and_the_others_wait(run, tmp_path):
    codes, printed = run("together", "datafree")
    assert codes == [0, 0], printed
    assert run("alone", "datafree", size=1)[0] == [0]
    assert files(tmp_path / "together") == files(tmp_path / "alone")


def test_ranks_stream_and_go_on(run, tmp_path):
    codes, printed = run("whole")
    assert codes == [0, 0], printed
    assert run("out", "model.layers.2")[0] == [-9, -9]
    assert not (tmp_path / "out").exists()
    codes, printed = run("out")
    assert codes == [0, 0], printed
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert run("alone", size=1)[0] == [0]
    together, alone, dense = (logits(tmp_path / name) for name in ("out", "alone", "model"))
    # Sums in another order flip a few points of the grids.
    assert float((together - alone).norm()) < 0.25 * float((dense - alone).norm())
