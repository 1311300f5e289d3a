"""A hook of mkdocs: equations as MathML, which browsers show by themselves.

A forge shows the same `$...$` and `$$...$$` of the Markdown in its own way.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of an equation.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, /, **_: Any) -> str:
    """The page's HTML with its equations converted."""
    return EQUATION.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    math = convert(html.unescape(latex).strip(), display="block" if bracket == "[" else "inline")
    if "\\" in math:
        raise ValueError(f"latex2mathml does not know all of {latex!r}")
    return f'<{tag} class="equation">{math}</{tag}>'
