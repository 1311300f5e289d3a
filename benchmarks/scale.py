"""How much faster several ranks are than one: the same task, one thread for each rank.

Seconds are those of oneshot, from the loaded model to the compressed one, and of its phases. cpu_seconds are the
processor's: what every rank does for itself shows there even on a busy machine, as far as that does not slow it down.

Cores share caches, memory and heat. Runs that have nothing to do with one another, one for each rank and all at the
same time, tell what the machine leaves of that many cores: the ceiling, beyond which no way of sharing can come.
"""

import json
import os
import subprocess
import sys
import time

from task import arguments, start

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH_THREADS": "1"}
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


def command(launcher: list[str]) -> list[str]:
    return [*launcher, __file__, *sys.argv[1:], "--as-rank"]


def results(out: str) -> list[dict]:
    rows = [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]
    return sorted(rows, key=lambda row: row["rank"])


def measure(ranks: int) -> list[dict]:
    """The rows of all ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(command(launcher), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return results(done.stdout)


def measure_apart(runs: int) -> list[dict]:
    """The rows of runs of one rank each, at the same time."""
    started = [
        subprocess.Popen(command([sys.executable]), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for _ in range(runs)
    ]
    return [row for process in started for row in results(process.communicate()[0])]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="balanced", choices=RECIPES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--as-rank", action="store_true", help="used by the benchmark itself")
    args = parser.parse_args()
    if args.as_rank:
        rank(args)
        return
    (alone,), several, apart = measure(1), measure(args.ranks), measure_apart(args.ranks)
    for row in (alone, *several, *apart):
        print("RESULT", json.dumps(row))
    slowest, cpu = (max(row[kind] for row in several) for kind in ("seconds", "cpu_seconds"))
    ceiling = args.ranks * alone["seconds"] / max(row["seconds"] for row in apart)
    print("RESULT", json.dumps({
        "recipe": args.recipe, "ranks": args.ranks, "samples": args.samples, "length": args.length,
        "times_as_fast": round(alone["seconds"] / slowest, 2),
        "cpu_times_as_fast": round(alone["cpu_seconds"] / cpu, 2),
        "ceiling": round(ceiling, 2), "of_ceiling": round(alone["seconds"] / slowest / ceiling, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
