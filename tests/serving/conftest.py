"""What was served, and how, for docs/serving.md: ``WRITE_SERVED=1 make test-serving`` puts the table there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.comparing import PROMPTS, Agreement

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
START, END = "<!-- served -->\n", "<!-- end of served -->"


@pytest.fixture(scope="session")
def served() -> Iterator[dict[str, Agreement | str]]:
    """What became of each scheme: how it agrees, or the server's error."""
    found: dict[str, Agreement | str] = {}
    yield found
    if os.environ.get("WRITE_SERVED") and found:
        before, _, rest = DOCS.read_text().partition(START)
        DOCS.write_text(f"{before}{START}{table(found)}\n{END}{rest.partition(END)[2]}")


def table(found: dict[str, Agreement | str]) -> str:
    """In Markdown."""
    lines = [
        "| scheme | same text | log-probabilities apart: mean | most | float16 in memory: mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    refused = ["", "| scheme | vLLM's words |", "| --- | --- |"]
    for name, what in found.items():
        if isinstance(what, str):
            refused.append(f"| {name} | {' '.join(what.split()).replace('|', '/')[:300]} |")
        else:
            lines.append(
                f"| {name} | {what.same} of {len(PROMPTS)} | {what.mean:.4f} | {what.most:.3f} | {what.rounding:.4f} |"
            )
    return "\n".join([*lines, *(refused if len(refused) > 3 else [])])
