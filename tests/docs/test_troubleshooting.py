"""What docs/troubleshooting.md quotes is what bitpress says."""

import ast
import re

import pages
import pytest

PAGE = pages.ROOT / "docs" / "troubleshooting.md"
SEVERAL = re.compile("…+")
QUOTES = [line.removeprefix("> ") for line in PAGE.read_text().splitlines() if line.startswith("> ")]


def said(node):
    """A text of the source, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@pytest.fixture(scope="module")
def texts():
    found = set()
    for file in (pages.ROOT / "src" / "bitpress").rglob("*.py"):
        found |= {
            SEVERAL.sub("…", said(n))
            for n in ast.walk(ast.parse(file.read_text()))
            if isinstance(n, (ast.JoinedStr, ast.Constant))
        }
    return found


@pytest.mark.parametrize("quote", QUOTES)
def test_is_in_the_source(quote, texts):
    # Where a text continues with what another function gives, the quote ends with …
    quote = quote.rstrip("….")
    assert any(quote in text for text in texts)


def test_there_are_quotes():
    assert len(QUOTES) > 30
