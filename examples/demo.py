"""The main job, from a real model to a small checkpoint: `make demo` runs this."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars; ours stays

import shutil
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from smollm2 import calibration_tokens, load_smollm2, peak_since_reset_gib, perplexity, reset_peak
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bitpress import oneshot
from bitpress.modifiers import AWQModifier, QuantizationModifier
from bitpress.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, QuantizationType

OUT = Path(tempfile.gettempdir()) / "smollm2-135m-awq"
PROMPT = "Emma Woodhouse, handsome, clever, and rich, had"

RECIPE = [
    AWQModifier(bits=4, symmetric=False),
    QuantizationModifier(
        ignore=["lm_head"],
        config_groups={
            "group_0": QuantizationScheme(
                targets=["Linear"],
                weights=QuantizationArgs(
                    num_bits=4,
                    type=QuantizationType.INT,
                    dynamic=False,
                    symmetric=False,
                    strategy=QuantizationStrategy.GROUP,
                    group_size=64,  # the hidden size, 576, has no groups of 128
                ),
            )
        },
    ),
]


def main() -> None:
    console = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with console.status("Taking SmolLM2-135M-Instruct out of its package"):
        model, tokenizer = load_smollm2()
    with console.status("Reading a novel with the original model"):
        before = {
            "size": weights_mb(model),
            "perplexity": perplexity(model, tokenizer),
            "text": go_on(model, tokenizer),
        }

    console.print("Compressing: AWQ, 4 bits, groups of 64, calibrated on 16 x 512 tokens of two other novels")
    dataset = calibration_tokens(tokenizer, 16, 512).tolist()
    loaded_gib, start = reset_peak(), time.perf_counter()
    oneshot(model, dataset, RECIPE, tokenizer=tokenizer, num_calibration_samples=16, progress=True)
    seconds, gib = time.perf_counter() - start, peak_since_reset_gib()
    shutil.rmtree(OUT, ignore_errors=True)
    model.save_pretrained(OUT)

    with console.status("Reading the same novel with the checkpoint, loaded back by transformers"):
        loaded = AutoModelForCausalLM.from_pretrained(OUT)
        same = bool(torch.equal(logits(loaded, tokenizer), logits(model, tokenizer)))
        after = {
            "size": checkpoint_mb(OUT),
            "perplexity": perplexity(loaded, tokenizer),
            "text": go_on(loaded, tokenizer),
        }
    console.print(
        result_table(before, after, {"seconds": seconds, "gib": gib, "above": gib - loaded_gib, "same": same})
    )
    console.print(f"The checkpoint is in {OUT}")


def result_table(before: dict, after: dict, run: dict) -> Table:
    table = Table("", "before", "after", title="SmolLM2-135M-Instruct", title_justify="left")
    table.add_row("weights on disk", f"{before['size']:.0f} MB", f"{after['size']:.0f} MB")
    table.add_row("perplexity, Northanger Abbey", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}")
    table.add_row(f"“{PROMPT} …”", before["text"], after["text"])
    table.add_section()
    table.add_row("compression took", "", f"{run['seconds']:.0f} s")
    table.add_row("peak memory", "", f"{run['gib']:.2f} GiB, {run['above']:.2f} above the loaded model")
    table.add_row("checkpoint says what memory says", "", "bit for bit" if run["same"] else "NO")
    return table


@torch.no_grad()
def go_on(model: torch.nn.Module, tokenizer, tokens: int = 16) -> str:
    """A greedy continuation of the prompt."""
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def logits(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def weights_mb(model: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def checkpoint_mb(path: Path) -> float:
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
