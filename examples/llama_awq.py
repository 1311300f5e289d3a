"""A Llama in 4 bits, with AWQ and with plain rounding: what the search for scales wins back.

Takes any language model that transformers reads, by its path or hub id. The checkpoint is what transformers, vLLM and
SGLang load; report.json beside it says how each layer went.

    python examples/llama_awq.py
    python examples/llama_awq.py path/to/llama out
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from bitpress import AWQModifier, QuantizationModifier, evaluate, oneshot
from bitpress.quantization import QuantizationArgs, QuantizationScheme

NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
READING = {"max_seq_length": 256, "concatenate_data": True}  # a novel is one text: it is cut into pieces

GRID = QuantizationArgs(num_bits=4, symmetric=False, group_size=64)
FOUR_BITS = QuantizationModifier(scheme=QuantizationScheme(targets=["Linear"], weights=GRID), ignore=["lm_head"])


def main(
    model: Annotated[str, typer.Argument()] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output_dir: Annotated[Path, typer.Argument()] = Path("llama-awq"),
) -> None:
    """Compress MODEL with AWQ into OUTPUT_DIR, and evaluate what is there."""
    rounded = oneshot(model, recipe=FOUR_BITS)
    oneshot(
        model, NOVELS / "emma.txt", [AWQModifier(), FOUR_BITS], output_dir=output_dir, overwrite=True,
        num_calibration_samples=32, **READING,
    )  # fmt: skip
    report = json.loads((output_dir / "report.json").read_text())
    print(f"{report['quantized_layers']} layers, {len(report['mappings'])} mappings found, proven and used")
    print(
        f"{report['weight_bytes_before']:,} bytes of weights, now {report['weight_bytes_after']:,}, in {output_dir}\n"
    )

    for name, compressed in (("rounded", rounded), ("AWQ", output_dir)):
        found = evaluate(
            compressed, NOVELS / "northanger-abbey.txt", original=model, num_samples=16, progress=False, **READING
        )
        if compressed is rounded:
            print(f"{'original':<10} perplexity {found.agreement.original_perplexity:.2f}")
        perplexity, lost = found.perplexity.perplexity, found.agreement.divergence
        print(f"{name:<10} perplexity {perplexity:.2f}   KL divergence {lost:.4f}")


if __name__ == "__main__":
    typer.run(main)
