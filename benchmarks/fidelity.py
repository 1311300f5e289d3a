"""What each algorithm wins back of the perplexity that round-to-nearest loses, in what time and memory, beside peers.

Each line is a process of its own, one after the other. The share won back is (round-to-nearest - it) over (round-to-
nearest - original), of each text's perplexity.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from task import TEXTS, arguments, figures, start

PEERS = {
    "llm-compressor awq": ("llm_compressor.py", "--algorithm", "awq"),
    "llm-compressor awq+gptq": ("llm_compressor.py", "--algorithm", "awq+gptq"),
    "auto-round-50": ("autoround.py", "--iterations", "50"),
    "auto-round-200": ("autoround.py", "--iterations", "200"),
}
QUALITIES = ("fast", "balanced", "best")
OURS = ("rtn", "awq", "gptq", "awq+gptq", *QUALITIES)


def compress(args: argparse.Namespace) -> None:
    """Our side: one algorithm, one line of figures."""
    from bitpress import AWQModifier, GPTQModifier, QuantizationModifier, oneshot
    from bitpress.quantization import QuantizationArgs, QuantizationScheme

    model, tokenizer, tokens = start(args)
    recipe, recipe_args = None, None
    if args.run in QUALITIES:
        recipe = f"w4a16-{args.run}"
        recipe_args = {"bits": args.bits, "symmetric": args.symmetric, "group_size": args.group}
        recipe_args |= _fields(args.recipe_args)
    elif args.run != "original":
        order = "static" if "gptq" in args.run else None
        weights = QuantizationArgs(
            num_bits=args.bits, symmetric=args.symmetric, strategy="group", group_size=args.group, actorder=order
        )
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        quantizer = GPTQModifier if "gptq" in args.run else QuantizationModifier
        recipe = [quantizer(config_groups=groups, ignore=["lm_head"], **_fields(args.gptq))]
        if "awq" in args.run:
            recipe.insert(0, AWQModifier())
    began = time.perf_counter()
    if recipe is not None:
        oneshot(model, tokens.tolist(), recipe, recipe_args=recipe_args, num_calibration_samples=args.samples)
    seconds = time.perf_counter() - began
    phases = {k: round(v, 1) for k, v in model.bitpress.report["seconds"].items()} if recipe is not None else {}
    stated = " ".join([args.run, *args.gptq, *args.recipe_args])
    figures(args, model, tokenizer, seconds, tool="bitpress", algorithm=stated, phases=phases)


def _fields(stated: list[str]) -> dict:
    """Fields of a modifier from ``name=value``."""
    return {name: json.loads(value) for name, _, value in (part.partition("=") for part in stated)}


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """Run every line asked for; those that a file of earlier results has are taken from there."""
    task = ["--bits", args.bits, "--samples", args.samples, "--seed", args.seed, "--group", args.group]
    task = [str(part) for part in task] + (["--symmetric"] if args.symmetric else [])
    here = Path(__file__).resolve()
    for name in ["original", *args.algorithms]:
        yield _run([sys.executable, str(here), "--run", name, *task])
    for name in args.peers:
        file, *options = PEERS[name]
        yield _run([args.peer_python, str(here.parent / "peers" / file), *options, *task])


def _run(command: list[str]) -> dict:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.exit(f"{' '.join(command)} printed no result:\n{done.stderr[-2000:]}")
    print("RESULT", found[-1], flush=True)
    return json.loads(found[-1])


def table(found: list[dict]) -> str:
    """The rows as a Markdown table."""
    original = found[0]
    nearest = next((row for row in found if row["algorithm"] == "rtn" and row["tool"] == "bitpress"), None)
    head = ["", *TEXTS, *(f"won back, {text}" for text in TEXTS), "seconds", "GiB above the model"]
    lines = [head, ["---"] * len(head)]
    for row in found:
        shares = ["", ""]
        if nearest is not None:
            lost = [nearest[text] - original[text] for text in TEXTS]
            shares = [f"{(nearest[text] - row[text]) / loss:.0%}" for text, loss in zip(TEXTS, lost, strict=True)]
        name = f"{row['tool']} {row['algorithm']}"
        cells = [name, *(f"{row[text]:.2f}" for text in TEXTS), *shares, f"{row['seconds']:.0f}", f"{row['above_gib']}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run one line, or all of them."""
    parser = arguments(__doc__)
    parser.add_argument("--run", choices=["original", *OURS], help="only this, in this process")
    parser.add_argument("--gptq", nargs="*", default=[], metavar="FIELD=VALUE", help="for --run")
    parser.add_argument("--recipe-args", nargs="*", default=[], metavar="NAME=VALUE", help="for --run")
    parser.add_argument("--algorithms", nargs="*", default=list(OURS), choices=OURS)
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--peer-python", help="the Python of an environment with the peers")
    args = parser.parse_args()
    if args.peers and not args.peer_python:
        parser.error("--peers needs --peer-python")
    if args.run:
        compress(args)
    else:
        print(table(list(rows(args))))


if __name__ == "__main__":
    main()
