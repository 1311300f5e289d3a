"""Time of data-free compression from file to file: against `cp`, against the model in memory, and against a peer.

4-bit asymmetric groups of 128, the head dense. Each time is of a process of its own, from when it has imported all to
when the bytes are on the disk; the ways take turns. Seconds of the processor are those of all threads.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from memory import make

IGNORED = ["lm_head"]


def copy(source: Path, output: Path) -> None:
    """What `cp` does."""
    subprocess.run(["cp", "-r", str(source), str(output)], check=True)  # noqa: S607


def from_files(source: Path, output: Path, *, stream: bool = True) -> None:
    """This package."""
    from bitpress import oneshot
    from bitpress.modifiers import QuantizationModifier

    recipe = [QuantizationModifier(scheme="W4A16_ASYM", ignore=IGNORED)]
    oneshot(source, None, recipe, output_dir=output, stream=stream, progress=False)


def from_memory(source: Path, output: Path) -> None:
    """This package, with the model in memory."""
    from_files(source, output, stream=False)


def by_peer(source: Path, output: Path) -> None:
    """llm-compressor, a thread for each shard."""
    import torch
    from llmcompressor import model_free_ptq

    ignore = [*IGNORED, "re:.*embed_tokens$"]
    model_free_ptq(
        source, output, scheme="W4A16_ASYM", ignore=ignore, max_workers=torch.get_num_threads(), device="cpu"
    )


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "cp": copy, "files": from_files, "memory": from_memory, "model_free_ptq": by_peer,
}  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Go one way, and print its figures."""
    if args.run != "cp":
        import torch

        torch.set_num_threads(args.threads)
        __import__("llmcompressor" if args.run == "model_free_ptq" else "bitpress")
    used, began = _processor(), time.perf_counter()
    WAYS[args.run](args.model, args.output)
    for file in args.output.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    figures = {"seconds": time.perf_counter() - began, "processor": _processor() - used}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    figures["peak_gb"] = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    print("RESULT", json.dumps({k: round(v, 3) for k, v in figures.items()}), flush=True)


def _processor() -> float:
    own, children = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> None:
    """Go one way, or all of them in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="with room for the checkpoints")
    parser.add_argument("--model", type=Path, help="a bfloat16 checkpoint; by default one is made")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("BENCH_THREADS", "2")))
    parser.add_argument("--peer-python", type=Path, help="of an environment with llm-compressor")
    parser.add_argument("--run", choices=WAYS, help="only this, in this process")
    parser.add_argument("--output", type=Path, help="for --run")
    args = parser.parse_args()
    if args.run:
        run(args)
        return
    model = args.model or make(args.directory, args.layers)
    pythons = {"cp": sys.executable, "files": sys.executable, "memory": sys.executable}
    if args.peer_python:
        pythons["model_free_ptq"] = str(args.peer_python)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in pythons}
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    for _ in range(args.rounds):
        for way, python in pythons.items():
            output = args.directory / f"out-{way}"
            command = [python, __file__, "--run", way, "--model", model, "--output", output, "--threads", args.threads]
            done = subprocess.run(
                [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
            found[way].append(json.loads(line.removeprefix("RESULT ")))
            shutil.rmtree(output)
    medians = {w: {k: statistics.median(f[k] for f in each) for k in each[0]} for w, each in found.items()}
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    for way, figures in medians.items():
        ratios = {f"{k}_to_files": round(figures[k] / medians["files"][k], 3) for k in ("seconds", "processor")}
        rate = round(size / 1e9 / figures["seconds"], 3)
        print("RESULT", json.dumps({"way": way, **figures, "gb_per_second": rate, **ratios}), flush=True)


if __name__ == "__main__":
    main()
