"""AutoRound on the shared task, in an environment of its own (see docs/benchmarks.md)."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from task import arguments, figures, start


def main() -> None:
    """Tune, and print one line of figures."""
    parser = arguments(__doc__)
    parser.add_argument("--iterations", type=int, default=50)
    args = parser.parse_args()
    from auto_round import AutoRound

    model, tokenizer, tokens = start(args)
    began = time.perf_counter()
    tuner = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group,
        sym=args.symmetric,
        iters=args.iterations,
        nsamples=args.samples,
        seqlen=args.length,
        dataset=[row[None] for row in tokens],
        batch_size=4,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    model, _ = tuner.quantize()
    seconds = time.perf_counter() - began
    figures(args, model, tokenizer, seconds, tool="auto-round", algorithm=f"auto-round-{args.iterations}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
