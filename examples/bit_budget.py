"""Bits where they count: each layer's width chosen so that the model changes least within a budget of bytes.

A few gradients tell how much the loss would grow if a layer had 2, 3, 4, 5, 6 or 8 bits. The budget here is what the
model takes with 4 bits throughout, so that both checkpoints are of one size; `bits_per_weight=4` would say nearly that.

    python examples/bit_budget.py
    python examples/bit_budget.py path/to/model out
"""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from bitpress import QuantizationModifier, evaluate, oneshot
from bitpress.quantization import QuantizationArgs, QuantizationScheme

NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
READING = {"max_seq_length": 256, "concatenate_data": True}


def grid(bits: int) -> QuantizationScheme:
    weights = QuantizationArgs(num_bits=bits, symmetric=False, group_size=64)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def main(
    model: Annotated[str, typer.Argument()] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output_dir: Annotated[Path, typer.Argument()] = Path("bit-budget"),
) -> None:
    """Compress MODEL to 4 bits throughout and to a mixture of the same size, and save this in OUTPUT_DIR."""
    uniform = oneshot(model, recipe=QuantizationModifier(scheme=grid(4), ignore=["lm_head"]))
    size = uniform.bitpress.report["weight_bytes_after"]
    recipe = QuantizationModifier(choose_from=[grid(b) for b in (2, 3, 4, 5, 6, 8)], max_bytes=size, ignore=["lm_head"])
    mixed = oneshot(
        model, NOVELS / "emma.txt", recipe, num_calibration_samples=8, output_dir=output_dir, overwrite=True, **READING
    )
    report = mixed.bitpress.report
    (allocation,) = report["allocations"]
    chosen = defaultdict(list)
    for group in allocation["groups"]:
        for layer in group["layers"]:
            chosen[layer.rpartition(".")[2]].append(report["layers"][layer]["bits"])
    print("bits of each kind of layer, over the depth of the model:")
    for kind, bits in chosen.items():
        print(f"  {kind:<12} {' '.join(map(str, bits))}")
    print(f"{allocation['bits_per_weight']:.2f} bits for a weight, {allocation['stored_bytes']:,} bytes in all; "
          f"4 bits throughout: {size:,} bytes\n")  # fmt: skip

    for name, compressed in (("4 bits throughout", uniform), ("bits by budget", mixed)):
        found = evaluate(
            compressed, NOVELS / "northanger-abbey.txt", original=model, num_samples=16, progress=False, **READING
        )
        perplexity, lost = found.perplexity.perplexity, found.agreement.divergence
        print(f"{name:<18} perplexity {perplexity:.2f}   KL divergence {lost:.4f}")


if __name__ == "__main__":
    typer.run(main)
