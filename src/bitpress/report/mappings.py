"""The mappings of a model for people, for programs, and as code."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from bitpress.models.blocks import Block
from bitpress.models.experts import ExpertLinear
from bitpress.modifiers.mappings import ResolvedMapping, reason_for_registration
from bitpress.modifiers.resolving import Resolution


@dataclass(frozen=True)
class MappingLine:
    """One mapping of a kind of block; names are those below the block, with ``*`` for the numbers of experts.

    Attributes:
        smooth: the layer that absorbs the scale.
        balance: the layers that receive it.
        difference: the greatest that the proof measured, over all blocks of the kind.
        power: the one with which a scale of the smooth layer's output arrives.
        source: "user", "registry" or "discovery".
        count: how many there are in one block: one for each expert.
    """

    smooth: str
    balance: tuple[str, ...]
    difference: float
    power: int
    source: str
    count: int


@dataclass(frozen=True)
class LeftLine:
    """Layers of a kind of block without a mapping, and why."""

    layers: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class KindOfBlock:
    """Blocks of one structure.

    Attributes:
        blocks: their names.
        mappings: those of each.
        left: the layers without a mapping.
    """

    blocks: tuple[str, ...]
    mappings: tuple[MappingLine, ...]
    left: tuple[LeftLine, ...]


@dataclass(frozen=True)
class MappingReport:
    """The mappings of a model, kind of block by kind of block. It prints as a table.

    Attributes:
        model: the model's class.
        kinds: the kinds of blocks, in the order of their first.
        why_registered: what the registry says of the family.
    """

    model: str
    kinds: tuple[KindOfBlock, ...]
    why_registered: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def as_code(self) -> str:
        """The ``AWQMapping`` list that states the same, to paste and to change."""
        lines = dict.fromkeys(_code(self, kind, line) for kind in self.kinds for line in kind.mappings)
        body = "".join(f"    {line},\n" for line in lines)
        return f"from bitpress.modifiers import AWQMapping\n\nmappings = [\n{body}]\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.why_registered:
            yield f"{self.model} is registered: {self.why_registered}"
        for kind in self.kinds:
            more = f" and {len(kind.blocks) - 1} more like it" if len(kind.blocks) > 1 else ""
            table = Table(title=f"{kind.blocks[0] or self.model}{more}", title_justify="left", title_style="bold")
            for column in ("smooth layer", "balance layers", "difference", "source"):
                table.add_column(column, overflow="fold")
            for line in kind.mappings:
                times = f" (× {line.count})" if line.count > 1 else ""
                power = " (squared)" if line.power == 2 else ""
                difference = f"{line.difference:.1e}"
                table.add_row(line.smooth + times, ", ".join(line.balance) + power, difference, line.source)
            for left in kind.left:
                table.add_row("[dim]–[/]", ", ".join(left.layers), "", f"[dim]{left.why}[/]")
            yield table
            yield ""


def report_mappings(model: nn.Module, blocks: Sequence[Block], resolution: Resolution) -> MappingReport:
    """What was found, kind of block by kind of block."""
    kinds: dict[tuple[Any, ...], list[Block]] = {}
    for block in blocks:
        # Blocks of one structure may differ in what holds: a mapping of the user's may name one of them only.
        lines = {m.smooth_name.removeprefix(block.name) for m in resolution.mappings[block.name]}
        kinds.setdefault((resolution.kinds[block.name], frozenset(lines)), []).append(block)
    return MappingReport(
        type(model).__name__,
        tuple(_kind(of_kind, resolution) for of_kind in kinds.values()),
        reason_for_registration(model) if _any_from(resolution, "registry") else "",
    )


def _any_from(resolution: Resolution, source: str) -> bool:
    return any(m.source == source for found in resolution.mappings.values() for m in found)


def _kind(blocks: Sequence[Block], resolution: Resolution) -> KindOfBlock:
    grouped: dict[tuple[str, tuple[str, ...]], list[ResolvedMapping]] = {}
    for block in blocks:
        modules = dict(block.named_modules())
        for mapping in resolution.mappings[block.name]:
            key = (_local(mapping.smooth_name, block, modules), _locals(mapping.balance, block, modules))
            grouped.setdefault(key, []).append(mapping)
    lines = tuple(
        MappingLine(*key, max(m.difference for m in found), found[0].power, found[0].source, len(found) // len(blocks))
        for key, found in grouped.items()
    )
    first, modules = blocks[0], dict(blocks[0].named_modules())
    left: dict[str, dict[str, None]] = {}
    for each in resolution.left.get(first.name, []):
        # What was measured differs from expert to expert.
        why = re.sub(r"\.\d+\.(?=\w+,)", ".*.", each.why)
        left.setdefault(why, {}).update(dict.fromkeys(_locals(each.layers, first, modules)))
    return KindOfBlock(
        tuple(b.name for b in blocks), lines, tuple(LeftLine(tuple(names), why) for why, names in left.items())
    )


def _locals(names: Iterable[str], block: Block, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_local(name, block, modules) for name in names))


def _local(name: str, block: Block, modules: dict[str, nn.Module]) -> str:
    """A layer's name below its block, with ``*`` for the number of an expert."""
    layer = modules[name]
    if isinstance(layer, ExpertLinear):
        name = f"{name.removesuffix(layer.local)}*.{layer.projection.part}".rstrip(".")
    return name.removeprefix(f"{block.name}.") if block.name else name


def _code(report: MappingReport, kind: KindOfBlock, line: MappingLine) -> str:
    """One mapping as code; it names blocks where another kind has these layers without the mapping."""
    elsewhere = [k for k in report.kinds if k is not kind and not _has(k, line)]
    if any(_names(k).intersection(line.balance) for k in elsewhere):
        prefix = f"({'|'.join(re.escape(name) for name in kind.blocks)})" + r"\."
    else:
        prefix = "|".join(dict.fromkeys(_place(name) for name in kind.blocks))
        prefix = f"({prefix})" if "|" in prefix else prefix
    smooth, *balance = (_pattern(prefix, name) for name in (line.smooth, *line.balance))
    return f"AWQMapping({smooth}, [{', '.join(balance)}])"


def _place(block: str) -> str:
    """A pattern of where blocks like this one are: ".*layers.<number>." of "model.layers.3"."""
    if not block:
        return ""
    parts = block.split(".")
    last = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    tail = [r"\d+" if part.isdigit() else re.escape(part) for part in parts[last:]]
    return (".*" if last else "") + r"\.".join(tail) + r"\."


def _has(kind: KindOfBlock, line: MappingLine) -> bool:
    return any((other.smooth, other.balance) == (line.smooth, line.balance) for other in kind.mappings)


def _names(kind: KindOfBlock) -> set[str]:
    """Layers of a kind that are known to be in it."""
    of_mappings = {name for line in kind.mappings for name in (line.smooth, *line.balance)}
    return of_mappings | {name for left in kind.left for name in left.layers}


def _pattern(prefix: str, name: str) -> str:
    escaped = re.escape(name).replace(r"\*", r"\d+")
    return f'r"re:{prefix}{escaped}$"'
