"""A BERT encoder in 4 bits: are sentences that were alike still alike?

Takes an encoder that transformers reads, by its path or hub id. Nothing precedes most of an encoder's layers that could
absorb a scale (its norms stand behind the residual), so GPTQ does the work here: it needs no mappings.

    python examples/bert_encoder.py
    python examples/bert_encoder.py path/to/encoder out
"""

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from bitpress import GPTQModifier, QuantizationModifier, oneshot
from bitpress.quantization import QuantizationArgs, QuantizationScheme

NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
FOUR_BITS = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, symmetric=True, group_size=64))
IGNORE = ["re:.*pooler.*"]  # it has no share in mean embeddings


def main(
    model: Annotated[str, typer.Argument()] = "sentence-transformers/all-MiniLM-L6-v2",
    output_dir: Annotated[Path, typer.Argument()] = Path("encoder-w4"),
) -> None:
    """Compress the encoder MODEL into OUTPUT_DIR, and compare its sentence embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model)
    texts, held_out = sentences("emma.txt", 256), sentences("northanger-abbey.txt", 100)
    before = embeddings(encoder, tokenizer, held_out)

    for modifier in (QuantizationModifier, GPTQModifier):
        recipe = modifier(scheme=FOUR_BITS, ignore=IGNORE)
        compressed = oneshot(
            copy.deepcopy(encoder), texts, recipe, tokenizer=tokenizer, num_calibration_samples=len(texts)
        )
        after = embeddings(compressed, tokenizer, held_out)
        off = (after - before).norm() / (before - before.mean(0)).norm()  # of what tells sentences apart
        same = (nearest(before) == nearest(after)).float().mean()
        name = modifier.__name__.removesuffix("Modifier")
        print(f"{name:<12} embeddings off by {off:.2%}   same nearest sentence {same:.1%}")

    report = compressed.bitpress.report
    compressed.save_pretrained(output_dir)
    loaded = embeddings(AutoModel.from_pretrained(output_dir), tokenizer, held_out)
    print(f"{report['quantized_layers']} layers, {report['weight_bytes_before']:,} bytes before, "
          f"{report['weight_bytes_after']:,} after; loaded from {output_dir} the embeddings are "
          f"{'the same, bit for bit' if torch.equal(loaded, after) else 'NOT the same'}")  # fmt: skip


def sentences(novel: str, count: int) -> list[str]:
    """The first of some length, behind the front matter."""
    text = " ".join((NOVELS / novel).read_text()[2000:200_000].split())
    return [sentence for sentence in text.split(". ") if 40 < len(sentence) < 160][:count]


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """(texts, width): the mean over each text's tokens."""
    found = []
    for text in texts:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        found.append(hidden[0].mean(0))
    return torch.stack(found)


def nearest(vectors: Tensor) -> Tensor:
    """For each vector the index of the other one that is most like it."""
    unit = nn.functional.normalize(vectors)
    return (unit @ unit.T).fill_diagonal_(-1).argmax(1)


if __name__ == "__main__":
    typer.run(main)
