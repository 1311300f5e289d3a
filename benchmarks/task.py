"""The task that every tool is given: SmolLM2-135M, calibration tokens of two novels, perplexity on two other texts."""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))

from smollm2 import calibration_tokens, load_smollm2, peak_since_reset_gib, perplexity, report, reset_peak  # noqa: E402

TEXTS = ("novel", "manual")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The task's own arguments."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration samples")
    return parser


def start(args: argparse.Namespace) -> tuple:
    """Model, tokenizer and calibration tokens; memory is counted from here on."""
    model, tokenizer = load_smollm2()
    tokens = calibration_tokens(tokenizer, args.samples, args.length, args.seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # mapped from the file until now
    args.base_gib = reset_peak()
    return model, tokenizer, tokens


def figures(args: argparse.Namespace, model, tokenizer, seconds: float, **row) -> None:
    """Print one RESULT line."""
    above = peak_since_reset_gib() - args.base_gib
    row |= {k: getattr(args, k) for k in ("bits", "symmetric", "group", "samples", "length", "seed")}
    row |= {"seconds": round(seconds, 1), "above_gib": round(above, 2), "threads": torch.get_num_threads()}
    report(**row, **{text: round(perplexity(model, tokenizer, text), 4) for text in TEXTS})
