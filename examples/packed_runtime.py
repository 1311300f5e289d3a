"""A compressed model that stays compressed in memory: bitpress.load, with no server.

transformers unpacks the weights of a checkpoint when it loads it; bitpress.load computes from the packed ones, on
torch's int4 kernel where there is one (bfloat16), or by unpacking one weight at a time.

    python examples/packed_runtime.py
    python examples/packed_runtime.py path/to/model out
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitpress
from bitpress import AWQModifier, oneshot

NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
PROMPT = "Emma Woodhouse, handsome, clever, and rich, had"


def main(
    model: Annotated[str, typer.Argument()] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output_dir: Annotated[Path, typer.Argument()] = Path("packed"),
) -> None:
    """Compress MODEL into OUTPUT_DIR, and let it speak from there, unpacked and packed."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    oneshot(
        original, NOVELS / "emma.txt", AWQModifier(bits=4, group_size=64, ignore=["lm_head"]), tokenizer=tokenizer,
        num_calibration_samples=16, max_seq_length=256, concatenate_data=True,
    ).save_pretrained(output_dir)  # fmt: skip

    ways = {
        "unpacked": bitpress.load(output_dir, packed=False),
        "packed": bitpress.load(output_dir),
        "packed, exact": bitpress.load(output_dir, exact=True),  # off the kernels: what the unpacked model computes
    }
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = {name: loaded(ids).logits.float() for name, loaded in ways.items()}
    for name, loaded in ways.items():
        start = time.perf_counter()
        out = loaded.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        speed = (out.shape[1] - ids.shape[1]) / (time.perf_counter() - start)
        off = float((logits[name] - logits["unpacked"]).norm() / logits["unpacked"].norm())
        print(f"{name:<14} {held(loaded):6.1f} MB   logits off by {off:.1e}   {speed:5.1f} tokens a second")
    print(f"{PROMPT} …{tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)}")


def held(model: nn.Module) -> float:
    """Megabytes of parameters and buffers, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) / 1e6


if __name__ == "__main__":
    typer.run(main)
