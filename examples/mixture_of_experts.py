"""A mixture of experts in 4 bits: each expert a layer of its own, whatever few tokens the router sends it.

What transformers keeps as one 3-D parameter is quantized expert by expert and saved under the names that vLLM and
SGLang read. Routers stay as they are, and are balanced together with their experts. By default every expert sees every
calibration token; with --routed-only it sees its own, and those that saw too few are solved from what all have seen.

    python examples/mixture_of_experts.py
    python examples/mixture_of_experts.py path/to/model out --routed-only
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

import bitpress
from bitpress import AWQModifier, evaluate, oneshot

NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
READING = {"max_seq_length": 256, "concatenate_data": True}


def main(
    model: Annotated[str, typer.Argument()] = "ibm-granite/granite-3.0-1b-a400m-instruct",
    output_dir: Annotated[Path, typer.Argument()] = Path("experts-w4"),
    routed_only: bool = False,
    group_size: int = 64,
) -> None:
    """Compress the mixture MODEL into OUTPUT_DIR block by block, from disk to disk."""
    oneshot(
        model, NOVELS / "emma.txt", AWQModifier(bits=4, group_size=group_size, ignore=["lm_head"]),
        moe_calibrate_all_experts=not routed_only, num_calibration_samples=16,
        output_dir=output_dir, overwrite=True, **READING,
    )  # fmt: skip
    report = json.loads((output_dir / "report.json").read_text())
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", name)) for name in report["layers"])
    print(f"{report['quantized_layers']} layers, {report['weight_bytes_before'] / 1e6:.1f} MB before, "
          f"{report['weight_bytes_after'] / 1e6:.1f} MB after:")  # fmt: skip
    for kind, count in kinds.items():
        print(f"  {count:5} × {kind}")
    balanced = max(report["mappings"], key=lambda mapping: len(mapping["balance_layers"]))
    print(f"{balanced['smooth_layer']} is balanced with {len(balanced['balance_layers'])} layers")
    print(f"{len(report['experts_with_few_tokens'])} layers of experts saw too few tokens of their own")

    packed = bitpress.load(output_dir)  # transformers reads packed experts of some families only
    found = evaluate(packed, NOVELS / "northanger-abbey.txt", original=model, num_samples=8, progress=False, **READING)
    print(f"perplexity {found.perplexity.perplexity:.2f}, of the original {found.agreement.original_perplexity:.2f}; "
          f"KL divergence {found.agreement.divergence:.4f}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
