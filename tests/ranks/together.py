"""A rank of test_joining.py: exchanges, then compresses a model and saves it in two ways. The last line is JSON."""

import hashlib
import json
import logging
import os
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from compressing import scheme, token_ids
from transformers import AutoModelForCausalLM

from bitpress import AWQModifier, GPTQModifier, QuantizationModifier, oneshot
from bitpress.ranks import ALONE, current, is_first, joined


def exchanged():
    with joined() as ranks:
        rank, size = ranks.rank, ranks.size
        assert (current(), is_first()) == (ranks, rank == 0)
        wide = torch.arange(12.0).view(3, 4) * (rank + 1)
        small, many = torch.full((2,), float(rank)), torch.ones(5_000_000)
        counts = torch.tensor([1, rank], dtype=torch.float64)
        # A view of some columns is added up where it is, whatever is beside it.
        ranks.sum([wide[:, :2], small, many, counts])
        times = size * (size + 1) // 2
        expected = torch.arange(12.0).view(3, 4)
        assert torch.equal(wide[:, :2], expected[:, :2] * times)
        assert torch.equal(wide[:, 2:], expected[:, 2:] * (rank + 1))
        assert small.tolist() == [sum(range(size))] * 2
        assert counts.tolist() == [size, sum(range(size))]
        assert bool((many == size).all())
        low, high = torch.tensor([float(rank), 5.0]), torch.tensor([float(-rank), 5.0])
        ranks.greatest([low])
        ranks.least([high])
        assert (low.tolist(), high.tolist()) == ([size - 1, 5.0], [1 - size, 5.0])
        # As many tensors as the rank's number: bytes, floats of 8 bits, none at all.
        own = [torch.full((rank, 3), i + 0.5).to(torch.float8_e4m3fn) for i in range(rank)]
        own += [torch.tensor([rank], dtype=torch.int64)] * rank
        for other, received in enumerate(ranks.gather(own, {"rank": rank, "none": None, "pair": (1, 2)})):
            assert received.note == {"rank": other, "none": None, "pair": [1, 2]}
            assert [t.dtype for t in received.tensors] == [torch.float8_e4m3fn] * other + [torch.int64] * other
            assert all(t.shape == (other, 3) for t in received.tensors[:other])
            assert all(t.tolist() == [other] for t in received.tensors[other:])
        assert ranks.from_first(torch.full((2, 2), float(rank)).T).tolist() == [[0.0, 0.0], [0.0, 0.0]]
        logging.getLogger("bitpress.test").warning("say both")
        if rank == 1:
            logging.getLogger("bitpress.test").warning("says rank 1 alone")
        assert ranks.seconds > 0
    assert current() is ALONE
    return "all as expected"


def digest(model):
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("weight"):
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def compress(recipe, **options):
    model = tiny.llama()
    oneshot(model, token_ids(5), recipe, num_calibration_samples=5, **options)
    return model


def main(folder):
    row = {"exchanged": exchanged()}
    assert not dist.is_initialized()
    groups = {"g": scheme()}
    quantize = GPTQModifier(ignore=["lm_head"], config_groups=groups)
    saved = compress([AWQModifier(), quantize], output_dir=folder / "out")
    assert (folder / "out" / "config.json").exists()  # nobody is back before it is there
    saved.save_pretrained(folder / "by itself")
    # The caller's own group.
    dist.init_process_group("gloo")
    other = compress([QuantizationModifier(ignore=["lm_head"], config_groups=groups)])
    total = torch.ones(1)
    dist.all_reduce(total)
    row["own group kept"] = int(total) == int(os.environ["WORLD_SIZE"])
    dist.barrier()
    dist.destroy_process_group()
    row["digests"] = [digest(saved), digest(other)]
    if os.environ["RANK"] == "0":
        for name, place in (("reloaded", "out"), ("saved by itself", "by itself")):
            row[name] = digest(saved) if same_logits(saved, folder / place) else "other logits"
    sys.stdout.write(json.dumps(row) + "\n")


def same_logits(model, place):
    return torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(place)), tiny.logits(model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
