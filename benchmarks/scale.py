"""How much faster several ranks are than one: the same task, one thread for each rank.

Seconds are those of oneshot, from the loaded model to the compressed one, and of its phases. cpu_seconds are the
processor's: what every rank does for itself shows there even on a busy machine, as far as that does not slow it down.
"""

import json
import os
import subprocess
import sys
import time

from task import arguments, start

RECIPES = {"awq": "awq-w4a16-asym-g64", "balanced": "w4a16-balanced"}


def rank(args) -> None:
    """One rank's part."""
    from bitpress import oneshot

    model, _, tokens = start(args)
    wall, cpu = time.perf_counter(), time.process_time()
    options = {"group_size": args.group} if args.recipe == "balanced" else {}
    oneshot(model, tokens.tolist(), RECIPES[args.recipe], recipe_args=options, num_calibration_samples=args.samples)
    row = {
        "rank": int(os.environ.get("RANK", "0")),
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "phases": model.bitpress.report["seconds"],
        "exchanging": model.bitpress.report.get("exchanging_seconds", 0),
        "weights": sum(float(p.detach().double().abs().sum()) for p in model.parameters()),
    }
    print("RESULT", json.dumps(row), flush=True)


def measure(ranks: int) -> list[dict]:
    """The rows of all ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH_THREADS": "1"}
    command = [*launcher, __file__, *sys.argv[1:], "--as-rank"]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]
    return sorted(rows, key=lambda row: row["rank"])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="balanced", choices=RECIPES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--as-rank", action="store_true", help="used by the benchmark itself")
    args = parser.parse_args()
    if args.as_rank:
        rank(args)
        return
    (alone,), several = measure(1), measure(args.ranks)
    for row in (alone, *several):
        print("RESULT", json.dumps(row))
    slowest = max(row["seconds"] for row in several)
    cpu = max(row["cpu_seconds"] for row in several)
    print("RESULT", json.dumps({
        "recipe": args.recipe, "ranks": args.ranks, "samples": args.samples, "length": args.length,
        "times_as_fast": round(alone["seconds"] / slowest, 2),
        "cpu_times_as_fast": round(alone["cpu_seconds"] / cpu, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
