"""A modifier of your own: it prunes weights by what they meet, before another modifier takes the rest to 8 bits.

Wanda (Sun et al., 2023, https://arxiv.org/abs/2306.11695): a weight counts as its magnitude times the norm of its
input; of each row those that count least become 0. Here, beside pruning by magnitude alone, which looks at no data.

    python examples/custom_modifier.py [MODEL]
"""

import sys
from pathlib import Path

from pydantic import Field

from bitpress import Modifier, QuantizationModifier, evaluate, oneshot
from bitpress.models import weight_matrix
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.statistics import Statistic

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"


class PruningModifier(Modifier):
    """Zero the share ``sparsity`` of each row: by weight and input, or with ``by_input=False`` by weight alone."""

    sparsity: float = Field(default=0.4, ge=0, lt=1)
    by_input: bool = True

    def required_statistics(self, state, name):
        """What calibration shall remember of the input of each layer that the recipe quantizes."""
        return Statistic.GRAM if self.by_input and name in state.schemes else Statistic.NONE

    def on_block(self, state, block):
        """Write the new weights of one block; the next modifier finds them there."""
        for name, layer in block.layers.items():
            weight = weight_matrix(layer)  # (out, in), a view of the layer's
            counts = weight.abs()
            if name in state.statistics:
                counts = counts * state.statistics[name].gram.diagonal().sqrt()
            least = counts.topk(int(self.sparsity * weight.shape[1]), largest=False).indices
            weight.scatter_(1, least, 0.0)
            state.layer_records.setdefault(name, {})["zeros"] = float((weight == 0).float().mean())


if __name__ == "__main__":
    reading = {"max_seq_length": 256, "concatenate_data": True}
    int8 = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, strategy="channel"))
    for by_input in (False, True):
        recipe = [PruningModifier(by_input=by_input), QuantizationModifier(scheme=int8, ignore=["lm_head"])]
        pruned = oneshot(MODEL, NOVELS / "emma.txt", recipe, num_calibration_samples=32, **reading)
        layers = pruned.bitpress.report["layers"].values()
        zeros = sum(layer["zeros"] for layer in layers) / len(layers)
        found = evaluate(pruned, NOVELS / "northanger-abbey.txt", original=MODEL, num_samples=16, **reading)
        how = "weight and input" if by_input else "weight alone"
        print(f"{zeros:.0%} zeros by {how:<17} perplexity {found.perplexity.perplexity:.2f}, "
              f"of the original {found.agreement.original_perplexity:.2f}")  # fmt: skip
