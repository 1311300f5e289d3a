"""Run the core tests beside each of several versions of compressed-tensors and transformers.

    python tests/environments.py                       # all pairs; says how each went
    python tests/environments.py --pair 0.17.0 5.19.0   # one
    python tests/environments.py --write                # and put the table into docs/serving.md

Nothing is installed into the environment that runs it: each version goes to a folder of its own under .environments/,
and its folder is the first on the path of the tests.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".environments"
DOCS = ROOT / "docs" / "serving.md"
# vLLM 0.32 pins the first of both; the last are what make setup installs.
COMPRESSED = ("0.17.0", "0.19.0", "0.20.0")
TRANSFORMERS = ("5.17.0", "5.19.0", "5.22.2")
# What touches the two libraries: packing of all bits, every preset from end to end, checkpoints written and read.
CORE = (
    "tests/test_versions.py",
    "tests/test_presets.py",
    "tests/quantization/test_packing.py",
    "tests/checkpoints/test_loading.py",
)


def installed(name: str, version: str) -> Path:
    """The folder that holds one version of a package and nothing else; filled the first time."""
    folder = FOLDER / f"{name}-{version}"
    if not (folder / "done").exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, "--no-deps", "--target", str(folder), f"{name}=={version}"], check=True)
        # Of what they need, only the client of the hub has versions that do not go with all of them.
        (about,) = folder.glob("*.dist-info/METADATA")
        needed = re.search(r"^Requires-Dist: (huggingface-hub[^;\n]*)$", about.read_text(), re.MULTILINE)
        if needed:
            subprocess.run([*pip, "--target", str(folder), needed[1]], check=True)
        (folder / "done").touch()
    return folder


def run(compressed: str, transformers: str, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether the tests pass beside this pair, and the last line of pytest."""
    first = [installed("compressed-tensors", compressed), installed("transformers", transformers)]
    path = os.pathsep.join(map(str, [*first, *filter(None, [os.environ.get("PYTHONPATH")])]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    lines = done.stdout.strip().splitlines() or ["nothing was run"]
    return not done.returncode, re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= "))


def table(found: dict[tuple[str, str], tuple[bool, str]]) -> str:
    """The results in Markdown."""
    lines = ["| compressed-tensors | transformers | core tests |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {c} | {t} | {said} |" for (c, t), (_, said) in found.items())])


def write(text: str) -> None:
    """Replace what is between the marks in the documentation."""
    page = DOCS.read_text()
    start, end = "<!-- environments -->\n", "<!-- end of environments -->"
    before, _, rest = page.partition(start)
    DOCS.write_text(f"{before}{start}{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, action="append", metavar=("COMPRESSED", "TRANSFORMERS"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("tests", nargs="*", default=CORE)
    stated = parser.parse_args()
    pairs = [tuple(p) for p in stated.pair or ()] or [(c, t) for t in TRANSFORMERS for c in COMPRESSED]
    found = {}
    for pair in pairs:
        found[pair] = run(*pair, tuple(stated.tests))
        print(f"compressed-tensors {pair[0]}, transformers {pair[1]}: {found[pair][1]}", flush=True)
    if stated.write:
        write(table(found))
    sys.exit(not all(passed for passed, _ in found.values()))


if __name__ == "__main__":
    main()
