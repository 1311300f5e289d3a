"""Weights and activations in 8 bits, which processors multiply fastest, with and without SmoothQuant.

An activation's few loud channels take the whole range of its grid. SmoothQuant hands a part of them over to the
weights, where a grid for each row copes. "search" finds for each mapping how large that part has to be.

    python examples/w8a8.py
    python examples/w8a8.py path/to/model out
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from bitpress import QuantizationModifier, SmoothQuantModifier, evaluate, oneshot

NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
READING = {"max_seq_length": 256, "concatenate_data": True}

INT8 = QuantizationModifier(scheme="W8A8", ignore=["lm_head"])  # a scale for each row, and for each token
RECIPES = {
    "W8A8": [INT8],
    "SmoothQuant 0.5": [SmoothQuantModifier(smoothing_strength=0.5), INT8],
    "SmoothQuant search": [SmoothQuantModifier(smoothing_strength="search"), INT8],
}


def main(
    model: Annotated[str, typer.Argument()] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output_dir: Annotated[Path, typer.Argument()] = Path("w8a8"),
) -> None:
    """Compress MODEL in three ways, and save the best in OUTPUT_DIR."""
    best, least = None, float("inf")
    for name, recipe in RECIPES.items():
        compressed = oneshot(model, NOVELS / "emma.txt", recipe, num_calibration_samples=32, **READING)
        found = evaluate(
            compressed, NOVELS / "northanger-abbey.txt", original=model, num_samples=16, progress=False, **READING
        )
        lost = found.agreement.divergence
        print(f"{name:<20} perplexity {found.perplexity.perplexity:.2f}   KL divergence {lost:.5f}")
        if lost < least:
            best, least = (name, compressed), lost
    name, compressed = best
    compressed.save_pretrained(output_dir)
    config = json.loads((output_dir / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    bits = {part: group[part]["num_bits"] for part in ("weights", "input_activations")}
    print(f"{name}, saved in {output_dir}: {bits['weights']}-bit weights, {bits['input_activations']}-bit activations")


if __name__ == "__main__":
    typer.run(main)
