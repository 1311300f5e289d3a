"""Elements of HTML and SVG as text. Whatever is not markup itself is escaped: names and recipes come from anywhere."""

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is markup already, and is not escaped again."""

    __slots__ = ()


Child = str | int | None

# Elements without content, which HTML does not close.
VOID = ("meta", "br")


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """One element.

    Args:
        name: of the element.
        *children: markup, or text, which is escaped; None is left out.
        **attributes: values are escaped; None leaves one out. ``class_`` is "class", ``aria_label`` is "aria-label".
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(children: Iterable[Child], between: str = "") -> Markup:
    """Markup and escaped text, one after the other."""
    return Markup(between.join(c if isinstance(c, Markup) else html.escape(str(c)) for c in children if c is not None))


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Child]], numbers: int = 0) -> Markup:
    """A table whose first column names its rows; the last ``numbers`` columns are set as numbers."""
    first = len(head) - numbers
    kinds = ["number" if i >= first else None for i in range(len(head))]
    body = [
        tag("tr", *(_cell(cell, kind, is_name=not i) for i, (cell, kind) in enumerate(zip(row, kinds, strict=True))))
        for row in rows
    ]
    columns = [tag("th", name, scope="col", class_=kind) for name, kind in zip(head, kinds, strict=True)]
    whole = tag(
        "table", tag("caption", caption), tag("thead", tag("tr", *columns)), tag("tbody", joined(body, "\n")),
    )  # fmt: skip
    return tag("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def _cell(cell: Child, kind: str | None, *, is_name: bool) -> Markup:
    return tag("th", cell, scope="row") if is_name else tag("td", cell, class_=kind)


def folded(summary: str, *children: Child) -> Markup:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), *children)


def _text(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
