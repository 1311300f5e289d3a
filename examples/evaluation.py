"""How good is it still? A model at 4 and at 3 bits, beside the original, by four measures.

Perplexity can improve by luck; the KL divergence from the original's predictions cannot. Questions are few here: a file
of yours, a set on the hub (choices="...") or lm-eval's tasks (tasks=["arc_easy"]) say more.

    python examples/evaluation.py
    python examples/evaluation.py path/to/model
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bitpress import QuantizationModifier, evaluate, oneshot
from bitpress.quantization import QuantizationArgs, QuantizationScheme

NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "Madrid"], "answer": "Paris"},
    {"question": "Ice is frozen", "choices": ["fire", "water", "stone"], "answer": "water"},
    {"question": "The opposite of hot is", "choices": ["warm", "cold", "tall"], "answer": "cold"},
    {"question": "A week has", "choices": ["five days", "seven days", "ten days"], "answer": "seven days"},
    {"question": "Bees make", "choices": ["milk", "bread", "honey"], "answer": "honey"},
    {"question": "The sun rises in the", "choices": ["east", "west", "north"], "answer": "east"},
]


def main(model: Annotated[str, typer.Argument()] = "HuggingFaceTB/SmolLM2-135M-Instruct") -> None:
    """Round MODEL to 4 and to 3 bits, and compare each with the original."""
    console = Console(width=100, highlight=False)
    table = Table("", "perplexity", "bits a byte", "KL divergence", "same top word", "right answers")
    for bits in (4, 3):
        weights = QuantizationArgs(num_bits=bits, symmetric=False, group_size=64)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        compressed = oneshot(model, recipe=QuantizationModifier(scheme=scheme, ignore=["lm_head"]))
        found = evaluate(
            compressed, NOVELS / "northanger-abbey.txt", original=model, choices=QUESTIONS,
            num_samples=16, max_seq_length=256, worst=3, progress=False,
        )  # fmt: skip
        agreement, choices = found.agreement, found.choices
        if bits == 4:
            before = f"{agreement.original_perplexity:.2f}"
            table.add_row("original", before, "", "0", "100%", f"{choices.original_accuracy:.0%}")
        table.add_row(
            f"{bits} bits",
            f"{found.perplexity.perplexity:.2f}",
            f"{found.perplexity.bits_per_byte:.3f}",
            f"{agreement.divergence:.4f} ± {agreement.standard_error:.4f}",
            f"{agreement.top1:.1%}",
            f"{choices.accuracy:.0%}",
        )
    console.print(table)
    console.print("Where 3 bits differ most from the original:")
    for each in agreement.worst:
        console.print(
            f"  …{each.context[-30:]!r}, then {each.token!r}: "
            f"the original says {each.original_says!r}, the model {each.model_says!r}", markup=False,
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
