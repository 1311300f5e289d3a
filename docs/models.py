"""Write docs/models.md: what bitpress makes of each architecture of the zoo in tests/architectures.py.

make models                         # all of them: about ten minutes
python docs/models.py llama mamba   # only these rows, the others stay
"""

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT / "tests"))

HEAD = """# Models

What bitpress finds in, and makes of, tiny random models of {count} architectures, each built from transformers' own
configuration ({version}). `make models` writes this page; a test holds it to what is.

For each: the mappings were discovered, none was listed beforehand, and each was proven; with random scales moved over
all of them at once the output stays within 1e-4 of its norm. The model was then compressed to 4 bits (symmetric, groups
of 32; AWQ where there are mappings), saved and loaded: the output equals, bit for bit, that of the model in memory.
Names are those below a block; `*` stands for every expert, whose projections count once for all. A kind of block is a
structure: blocks of the same modules and shapes are one kind.

- *left without a mapping*: targeted layers that AWQ does not smooth, and why. They are quantized all the same.
- *not quantized*: linear layers that are left alone, and why.
- *read by*: transformers, or `bitpress.load` where transformers cannot read this model packed. "In part dense": some
  layers hold quantized values but are stored in full precision, because no reader takes them packed.

| architecture | class | kinds of blocks | mappings | smooth layer → balance layers | left without a mapping | \
quantized | not quantized | read by |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main(names: list[str]) -> int:
    """Examine the named architectures, or all, and write the page; 1 if one fails."""
    warnings.filterwarnings("ignore")
    import transformers  # noqa: PLC0415
    from architectures import ARCHITECTURES  # noqa: PLC0415
    from examining import examine, row  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = {}
    if PAGE.exists():
        lines = PAGE.read_text().splitlines()
        known = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    failed = 0
    for name in names or ARCHITECTURES:
        try:
            known[name] = row(name, examine(name))
            print(name, flush=True)
        except Exception as error:
            failed = 1
            print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
    rows = [known[name] for name in ARCHITECTURES if name in known]
    head = HEAD.replace("\\\n", "").format(count=len(rows), version=f"transformers {transformers.__version__}")
    PAGE.write_text(head + "\n".join(rows) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
