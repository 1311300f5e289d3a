"""An extension of griffe: the roles of docstrings (``:func:`name```) as links, where the reference has the name."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod|data):`~?([\w.]+)`")

SAME = ("bitpress.evaluate", "bitpress.oneshot", "bitpress.plan")


class Roles(griffe.Extension):
    """Replaces roles before the docstrings are rendered."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See :class:`griffe.Extension`."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(found: re.Match[str]) -> str:
    name = found.group(1)
    if not name.startswith("bitpress."):
        return f"`{name}`"
    # Functions that are called as their modules are.
    place = f"{name}.{name.partition('.')[2]}" if name in SAME else name
    return f'<autoref identifier="{place}" optional><code>{name}</code></autoref>'
