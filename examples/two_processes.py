"""One compression, several processes: nothing but torchrun is needed.

    torchrun --nproc-per-node 2 examples/two_processes.py
    python examples/two_processes.py     # the same, alone

Each process calibrates with a share of the batches and solves a share of every block. All of them end with the same
model, to the bit, as the checksums show; only the first writes it.
"""

import os
import zlib
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from bitpress import AWQModifier, GPTQModifier, oneshot
from bitpress.quantization import QuantizationArgs, QuantizationScheme

NOVELS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
FOUR_BITS = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=64))


def main(
    model: Annotated[str, typer.Argument()] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output_dir: Annotated[Path, typer.Argument()] = Path("by-two"),
) -> None:
    """Compress MODEL into OUTPUT_DIR, by as many processes as torchrun has started."""
    compressed = oneshot(
        model, NOVELS / "emma.txt", [AWQModifier(), GPTQModifier(scheme=FOUR_BITS, ignore=["lm_head"])],
        num_calibration_samples=16, max_seq_length=256, concatenate_data=True,
    )  # fmt: skip
    compressed.save_pretrained(output_dir)
    report = compressed.bitpress.report
    waited = f", {report['exchanging_seconds']:.1f} s of it exchanging" if PROCESSES > 1 else ""
    print(f"process {RANK + 1} of {PROCESSES}: checksum {checksum(compressed):08x}, "
          f"{sum(report['seconds'].values()):.1f} s{waited}", flush=True)  # fmt: skip
    if RANK == 0:
        print(f"saved in {output_dir}", flush=True)


def checksum(model: nn.Module) -> int:
    """Of all weights, to the last bit."""
    found = 0
    for parameter in model.parameters():
        found = zlib.crc32(parameter.detach().float().numpy().tobytes(), found)
    return found


if __name__ == "__main__":
    typer.run(main)
