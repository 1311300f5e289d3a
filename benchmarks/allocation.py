"""Bit allocation on SmolLM2-135M: what is estimated beside what is measured.

With ``--truth`` each group of layers alone is rounded to the smaller of the candidates, the divergence from the model's
own predictions is measured, and set beside the estimate. Otherwise the model is compressed with each candidate for all
layers, and with each layer's own at ``--bits-per-weight``, and the perplexities are compared with the straight line
between the two uniform ones that stand around it.
"""

import copy
import math
import sys
import time
from pathlib import Path

import torch

for folder in ("benchmarks", "examples"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))

from compressed_tensors.quantization import ActivationOrdering  # noqa: E402
from smollm2 import evaluation_text, perplexity, report  # noqa: E402
from task import TEXTS, arguments, start  # noqa: E402

from bitpress import AWQModifier, GPTQModifier, QuantizationModifier, oneshot  # noqa: E402
from bitpress.modifiers.allocation import describe, rounding_error  # noqa: E402
from bitpress.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402


def scheme(args, bits: int) -> QuantizationScheme:
    """Of the task's groups, with that many bits."""
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=args.symmetric, strategy="group", group_size=args.group
    )
    if "gptq" in args.algorithm:
        weights = weights.model_copy(update={"actorder": ActivationOrdering.STATIC})
    return QuantizationScheme(targets=["Linear"], weights=weights)


def compress(args, model, tokens, **stated) -> float:
    """Compress the model in place; the seconds that it took."""
    quantizer = GPTQModifier if "gptq" in args.algorithm else QuantizationModifier
    recipe = [quantizer(ignore=["lm_head"], **stated)]
    if "awq" in args.algorithm:
        recipe.insert(0, AWQModifier())
    began = time.perf_counter()
    oneshot(model, tokens.tolist(), recipe, num_calibration_samples=args.samples)
    return time.perf_counter() - began


@torch.no_grad()
def predictions(model, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row, use_cache=False).logits.float().log_softmax(-1) for row in tokens.split(1)])


@torch.no_grad()
def truth(args, model, tokenizer, tokens) -> None:
    """The divergence that each group of layers alone makes, and how the estimates rank them."""
    estimated = copy.deepcopy(model)
    compress(args, estimated, tokens, **choice(args))
    found = estimated.bitpress.report["allocations"][0]
    print("seconds", estimated.bitpress.report["seconds"])
    ids = tokenizer(evaluation_text("novel"), return_tensors="pt", verbose=False).input_ids[0]
    held_out = ids[: args.windows * 256].view(-1, 256)
    own = predictions(model, held_out)
    for bits in args.truth:
        weights = scheme(args, bits).weights
        measured, estimates = [], []
        for group in found["groups"][:: args.every]:
            layers = [model.get_submodule(name) for name in group["layers"]]
            before = [layer.weight.data.clone() for layer in layers]
            for layer in layers:
                layer.weight.data += rounding_error(layer.weight.data, weights)
            divergence = float((own.exp() * (own - predictions(model, held_out))).sum(-1).mean())
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.data = weight
            measured.append(divergence)
            estimates.append(group["growth"][describe(weights)])
            report(layers=group["layers"], bits=bits, measured=round(divergence, 6), estimate=round(estimates[-1], 6))
        pair = torch.tensor([measured, estimates]).double()
        ranks = pair.argsort().argsort().double()
        report(
            bits=bits,
            groups=len(measured),
            rank_correlation=round(float(torch.corrcoef(ranks)[0, 1]), 4),
            log_correlation=round(float(torch.corrcoef(pair.log())[0, 1]), 4),
            estimate_over_measured=round(float(pair[1].sum() / pair[0].sum()), 3),
        )


def choice(args) -> dict:
    """The fields that state the choice."""
    return {
        "choose_from": [scheme(args, bits) for bits in args.choose_from],
        "bits_per_weight": args.bits_per_weight,
    }


def mixed(args, model, tokenizer, tokens) -> None:
    """Uniform schemes, and each layer's own."""
    rows = {}
    below, above = math.floor(args.bits_per_weight), math.ceil(args.bits_per_weight)
    for bits in (*((below, above) if not args.only_mixed else ()), None):
        compressed = copy.deepcopy(model)
        stated = choice(args) if bits is None else {"scheme": scheme(args, bits)}
        seconds = compress(args, compressed, tokens, **stated)
        done = compressed.bitpress.report
        row = {text: perplexity(compressed, tokenizer, text, windows=args.windows) for text in TEXTS}
        rows[bits] = row
        allocation = done.get("allocations", [{}])[0]
        kept = {k: round(v, 4) for k, v in allocation.items() if isinstance(v, float)}
        count: dict[str, int] = {}
        for group in allocation.get("groups", ()):
            count[group["chosen"]] = count.get(group["chosen"], 0) + 1
        report(
            algorithm=args.algorithm,
            bits=bits if bits is not None else args.choose_from,
            seconds=round(seconds, 1),
            phases=done["seconds"],
            weight_bytes=done["weight_bytes_after"],
            **kept,
            groups=count,
            **{text: round(p, 4) for text, p in row.items()},
        )
    if args.only_mixed or below == above:
        return
    share = args.bits_per_weight - below
    for text in TEXTS:
        low, high, own = rows[below][text], rows[above][text], rows[None][text]
        report(
            text=text,
            mixed=round(own, 4),
            line=round((1 - share) * low + share * high, 4),
            line_of_logarithms=round(low ** (1 - share) * high**share, 4),
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--algorithm", default="rtn", choices=["rtn", "gptq", "awq", "awq+gptq"])
    parser.add_argument("--bits-per-weight", type=float, default=3.5)
    parser.add_argument("--choose-from", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--windows", type=int, default=24, help="of the evaluation texts")
    parser.add_argument("--only-mixed", action="store_true", help="leave the uniform schemes out")
    parser.add_argument("--truth", type=int, nargs="+", help="bits with which to measure each group alone")
    parser.add_argument("--every", type=int, default=1, help="measure every so many groups")
    args = parser.parse_args()
    model, tokenizer, tokens = start(args)
    (truth if args.truth else mixed)(args, model, tokenizer, tokens)


if __name__ == "__main__":
    main()
