"""What is in a checkpoint, for people and for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from bitpress.report.describing import pattern, size
from bitpress.report.histogram import Bin, Histogram


@dataclass(frozen=True)
class LayerSize:
    """A weight of a checkpoint.

    Attributes:
        name: what its tensors' names begin with.
        shape: of the weight; (out, in) of a layer.
        scheme: how it is quantized, in words; "dense" if it is not.
        dtype: of a dense weight; None of a quantized one.
        nbytes: of all that is stored of it.
        bits: that it takes for each weight, scales and all.
        scales: the least and the greatest step of its grids; None of a dense one.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    dtype: str | None
    nbytes: int
    bits: float
    scales: tuple[float, float] | None

    @property
    def kind(self) -> str:
        """The scheme, or the dtype."""
        return self.dtype or self.scheme


@dataclass(frozen=True)
class Inspection:
    """What :func:`bitpress.inspect` found. It prints as tables.

    Attributes:
        source: the checkpoint.
        format: "compressed-tensors", "awq", "gptq" or "dense".
        files: how many safetensors files there are.
        nbytes: of all tensors.
        layers: every weight of two or more dimensions, or those that were asked for.
        rest: bytes of all other tensors: norms, biases of their own, static scales.
        histogram: of the steps between the points of the layers' grids.
        each: show layer by layer, and not only kind by kind.
    """

    source: str
    format: str
    files: int
    nbytes: int
    layers: tuple[LayerSize, ...]
    rest: int
    histogram: Histogram
    each: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        scales: list[Bin] = self.histogram.bins()
        return {
            "source": self.source,
            "format": self.format,
            "files": self.files,
            "bytes": self.nbytes,
            "weights": sum(_count(layer) for layer in self.layers),
            "bits_per_weight": self._bits(),
            "other_bytes": self.rest,
            "layers": {layer.name: {k: v for k, v in asdict(layer).items() if k != "name"} for layer in self.layers},
            "scales": {"bins": [asdict(each) for each in scales], "zeros": self.histogram.zeros},
        }

    def _bits(self) -> float:
        return 8 * sum(layer.nbytes for layer in self.layers) / max(1, sum(map(_count, self.layers)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        quantized = sum(layer.dtype is None for layer in self.layers)
        yield (
            f"{escape(self.source)}: {self.format}, {size(self.nbytes)} in {self.files} file{'s' * (self.files != 1)}, "
            f"{quantized} of {len(self.layers)} weights quantized, {self._bits():.2f} bits a weight"
        )
        yield self._by_scheme()
        yield self._by_layer()
        lines = list(self.histogram.lines())
        if lines:
            yield "[bold]scales[/], the steps between the points of a grid"
            yield from (f"  {line}" for line in lines)

    def _by_scheme(self) -> Table:
        table = _table("scheme", "layers", "weights", "bytes", "bits a weight")
        kinds: dict[str, list[LayerSize]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        for kind, layers in kinds.items():
            nbytes, weights = sum(each.nbytes for each in layers), sum(map(_count, layers))
            table.add_row(kind, str(len(layers)), f"{weights:,}", size(nbytes), f"{8 * nbytes / weights:.2f}")
        if self.rest:
            table.add_row("[dim]all else[/]", "", "", size(self.rest), "")
        return table

    def _by_layer(self) -> Table:
        table = _table("layer", "shape", "scheme", "bytes", "scales")
        for name, layers in self._rows():
            first = layers[0]
            ranges = [each.scales for each in layers if each.scales]
            scales = f"{min(a for a, _ in ranges):.2g} – {max(b for _, b in ranges):.2g}" if ranges else ""
            times = f" ({len(layers)})" if len(layers) > 1 else ""
            shape, nbytes = " × ".join(map(str, first.shape)), size(sum(each.nbytes for each in layers))
            table.add_row(f"{escape(name)}{times}", shape, first.kind, nbytes, scales)
        return table

    def _rows(self) -> Iterator[tuple[str, Sequence[LayerSize]]]:
        if self.each:
            yield from ((layer.name, [layer]) for layer in self.layers)
            return
        alike: dict[tuple[Any, ...], list[LayerSize]] = {}
        for layer in self.layers:
            alike.setdefault((pattern(layer.name), layer.shape, layer.kind), []).append(layer)
        for (name, *_), layers in alike.items():
            yield (name if len(layers) > 1 else layers[0].name), layers


def _count(layer: LayerSize) -> int:
    found = 1
    for each in layer.shape:
        found *= each
    return found


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in ("layers", "weights", "bytes", "bits a weight")
        table.add_column(column, justify="right" if right else "left", no_wrap=right or column == "layer")
    return table
