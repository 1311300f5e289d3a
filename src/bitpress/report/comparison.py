"""How two checkpoints differ, for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from bitpress.report.describing import size

# Below it two weights differ by what float32 makes of them.
SAME = 1e-12


@dataclass(frozen=True)
class Difference:
    """One weight of both checkpoints.

    Attributes:
        name: of the layer.
        kinds: scheme (or dtype, of a dense weight) in the first and in the second.
        nbytes: of all that is stored of it, in the first and in the second.
        error: squared error of the second's dequantized weight, relative to the energy of the first's:
            sum((B − A)²) / sum(A²). The ``weight_error`` of report.json is the same, estimated from some rows
            where a weight is only rounded to nearest.
        beyond_scales: what is left of it when the scales that AWQ and SmoothQuant move between layers are taken out:
            sum((B − RAS)²) / sum(B²) with the best diagonal R (of outputs) and S (of inputs).
    """

    name: str
    kinds: tuple[str, str]
    nbytes: tuple[int, int]
    error: float
    beyond_scales: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`bitpress.compare` found. It prints as a table.

    Attributes:
        sources: the two checkpoints.
        formats: theirs.
        nbytes: of all tensors of each.
        layers: the weights that both have, those first that differ most.
        other_shapes: names of those whose shapes differ.
        missing: names that only the first has, and names that only the second has.
        shown: how many layers are printed.
    """

    sources: tuple[str, str]
    formats: tuple[str, str]
    nbytes: tuple[int, int]
    layers: tuple[Difference, ...]
    other_shapes: tuple[str, ...]
    missing: tuple[tuple[str, ...], tuple[str, ...]]
    shown: int

    @property
    def same(self) -> bool:
        """True if every weight of one is in the other, with the same scheme and the same values."""
        unlike = any(each.error > SAME or each.kinds[0] != each.kinds[1] for each in self.layers)
        return not (unlike or self.other_shapes or any(self.missing))

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        first, second = self.missing
        return {
            "sources": list(self.sources),
            "formats": list(self.formats),
            "bytes": list(self.nbytes),
            "same": self.same,
            "layers": {each.name: {k: v for k, v in asdict(each).items() if k != "name"} for each in self.layers},
            "other_shapes": list(self.other_shapes),
            "only_in_first": list(first),
            "only_in_second": list(second),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for which, source, kind, nbytes in zip("AB", self.sources, self.formats, self.nbytes, strict=True):
            yield f"{which}  {escape(source)}: {kind}, {size(nbytes)}"
        if self.same:
            yield f"All {len(self.layers)} weights are the same."
            return
        changed = [each for each in self.layers if each.error > SAME]
        schemes = sum(each.kinds[0] != each.kinds[1] for each in self.layers)
        yield (
            f"{len(changed)} of {len(self.layers)} weights differ, {schemes} of them in how they are stored"
            if changed
            else f"all {len(self.layers)} weights are the same; {schemes} of them are stored another way"
        )
        rows = [each for each in self.layers if each.error > SAME or each.kinds[0] != each.kinds[1]]
        if rows:
            yield _table(rows[: self.shown])
        if len(rows) > self.shown:
            yield f"and {len(rows) - self.shown} more, by less"
        yield from self._unmatched()

    def _unmatched(self) -> RenderResult:
        lists = (
            ("have other shapes", self.other_shapes),
            ("are only in A", self.missing[0]),
            ("are only in B", self.missing[1]),
        )
        for what, names in lists:
            if names:
                more = ", ..." if len(names) > 3 else ""
                yield f"{len(names)} {what}: {escape(', '.join(names[:3]))}{more}"


def _table(rows: Sequence[Difference]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("stored as")
    for column in ("bytes", "error", "beyond scales"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in rows:
        kinds = " → ".join(dict.fromkeys(each.kinds))
        sizes = " → ".join(dict.fromkeys(map(size, each.nbytes)))
        table.add_row(escape(each.name), kinds, sizes, _number(each.error), _number(each.beyond_scales))
    return table


def _number(error: float) -> str:
    return "0" if error <= SAME else f"{error:.2e}"
