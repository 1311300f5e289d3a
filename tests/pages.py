"""The pages of the documentation, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Python is run; "python notest" is other libraries' code, or what needs more than a tiny model and one process.
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(bitpress [^`\n]+(?:\n[^`\n]+)?)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, what else its info string says, its text, and the line that it begins in."""

    language: str
    notes: tuple[str, ...]
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks, in order."""
    text = page.read_text()
    return [
        Block(found[1], tuple(found[2].split()), found[3], text.count("\n", 0, found.start(3)) + 1)
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """The calls of bitpress in a console block, without prompts and comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):  # what is without a prompt is an answer
        lines = [line for line in lines if line.startswith("$ ")]
    stripped = (re.sub(r"\s#.*", "", line).removeprefix("$ ").strip() for line in lines)
    return [line for line in stripped if line.startswith("bitpress ")]


def mentions(page: Path) -> list[str]:
    """The calls of bitpress within the text."""
    return [" ".join(found.split()) for found in INLINE.findall(page.read_text())]
