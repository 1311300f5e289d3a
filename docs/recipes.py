"""Write the tables of docs/recipes.md from the comments of recipes/*.yaml.

python docs/recipes.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- recipes -->\n", "<!-- end of recipes -->"
GROUPS = {
    "Weights of 4 bits and fewer": (
        "w4a16-fast", "w4a16-balanced", "w4a16-best", "w3a16-best", "w2a16-best", "mixed-bits", "awq-w4a16-asym",
        "awq-w4a16-asym-g64", "awq-w4a16", "gptq-w4a16", "w4a16-asym", "w4a16",
    ),
    "Weights of 8 bits": ("w8a16",),
    "Weights and inputs": (
        "w8a8-dynamic", "smoothquant-w8a8", "smoothquant-gptq-w8a8", "w8a8-static", "fp8-dynamic", "fp8", "fp8-block",
        "w4a8", "w4afp8",
    ),
    "Floats of 4 and 8 bits with scales of their own kind": ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8"),
    "Cache and attention": ("kv-cache-fp8", "kv-cache-int8", "attention-fp8"),
    "For llama.cpp": ("gguf-q4-0", "gguf-q8-0"),
    "All others": ("preset",),
}  # fmt: skip


def tables(files: dict[str, Path]) -> str:
    """The tables: of each recipe its name, what it is for, what it costs, and its arguments."""
    from bitpress.session.recipe import arguments_of  # noqa: PLC0415

    parts = []
    for heading, names in GROUPS.items():
        rows = ["| recipe | what it is for | what it costs | arguments |", "| --- | --- | --- | --- |"]
        for name in names:
            use, cost = about(files[name])
            arguments = ", ".join(f"`{argument}`" for argument in arguments_of(files[name]))
            rows.append(f"| `{name}` | {use} | {cost} | {arguments} |")
        parts.append("\n".join([f"### {heading}\n", *rows]))
    return "\n\n".join(parts) + "\n"


def about(file: Path) -> tuple[str, str]:
    """What a recipe's comment says: the lines that belong to its first sentences, and the rest.

    A line that goes on in the next one has no full stop at its end.
    """
    lines = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    ends = next(i for i, line in enumerate(lines) if re.search(r"[.)]$|\.\.$", line)) + 1
    return " ".join(lines[:ends]), " ".join(lines[ends:])


def page(files: dict[str, Path]) -> str:
    """The page as it has to be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}{tables(files)}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    from bitpress.session.recipe import shipped_recipes

    PAGE.write_text(page(shipped_recipes()), encoding="utf-8")
