"""AWQ on SmolLM2-135M: time, memory and perplexity, and what they are against one plain forward pass.

The peers' side of the table is measured with the same tokens, scheme and threads, one run after the other, in an
environment of their own: see docs/benchmarks.md.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))

from compressed_tensors.quantization import ActivationOrdering  # noqa: E402
from smollm2 import calibration_tokens, load_smollm2, peak_gib, perplexity, report  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from bitpress import AWQModifier, GPTQModifier, QuantizationModifier, oneshot  # noqa: E402
from bitpress.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402


@torch.no_grad()
def forward_seconds(model, tokens: torch.Tensor, batch_size: int) -> float:
    """One plain forward pass over the calibration tokens, logits included."""
    start = time.perf_counter()
    for batch in tokens.split(batch_size):
        model(batch, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithm", default="awq", choices=["rtn", "awq", "awq+gptq"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--duo-scaling", default="true", choices=["true", "false", "both"])
    parser.add_argument("--no-clip", action="store_true", help="ranges from the least to the greatest value")
    parser.add_argument(
        "--forward",
        action="store_true",
        help="time a plain forward pass before and after too (it needs more memory: memory is not reported then)",
    )
    parser.add_argument("--reload", action="store_true", help="save, load with transformers, compare all logits")
    args = parser.parse_args()

    model, tokenizer = load_smollm2()
    tokens = calibration_tokens(tokenizer, args.samples, args.length)
    weights = QuantizationArgs(num_bits=args.bits, type="int", symmetric=False, strategy="group", group_size=args.group)
    gptq = args.algorithm == "awq+gptq"
    if gptq:
        weights = weights.model_copy(update={"actorder": ActivationOrdering.STATIC})
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    quantizer = GPTQModifier if gptq else QuantizationModifier
    quantize = quantizer(config_groups={"group_0": scheme}, ignore=["lm_head"])
    duo = {"true": True, "false": False}.get(args.duo_scaling, "both")
    recipe = [quantize] if args.algorithm == "rtn" else [AWQModifier(duo_scaling=duo, clip=not args.no_clip), quantize]

    plain = [forward_seconds(model, tokens, args.batch_size)] if args.forward else []
    base, start = peak_gib(), time.perf_counter()
    oneshot(model, tokens.tolist(), recipe, num_calibration_samples=args.samples, batch_size=args.batch_size)
    seconds, peak = time.perf_counter() - start, peak_gib()
    row = {
        "tool": "bitpress",
        "algorithm": args.algorithm,
        "samples": args.samples,
        "length": args.length,
        "bits": args.bits,
        "group": args.group,
        "seconds": round(seconds, 1),
        "phases": {k: round(v, 1) for k, v in model.bitpress.report["seconds"].items()},
    }
    if args.forward:
        plain.append(forward_seconds(model, tokens, args.batch_size))
        row |= {
            "forward_seconds": [round(s, 1) for s in plain],
            "over_forward": round(2 * seconds / sum(plain), 2),
        }
    else:
        row |= {"base_gib": round(base, 2), "peak_gib": round(peak, 2), "above_gib": round(peak - base, 2)}
    row["perplexity"] = round(perplexity(model, tokenizer), 4)
    if args.reload:
        row["reloaded_logits_equal"] = reloaded_equal(model, tokens)
    report(**row)


@torch.no_grad()
def reloaded_equal(model, tokens: torch.Tensor) -> bool:
    """Whether transformers' logits for all calibration tokens are, bit for bit, those of the model in memory."""
    folder = Path(tempfile.mkdtemp())
    try:
        model.save_pretrained(folder / "out")
        loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
        return all(torch.equal(loaded(x).logits, model(x).logits) for x in tokens.split(1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
