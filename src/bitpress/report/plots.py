"""Plots as inline SVG: pure functions of numbers, without scripts; colours are the page's."""

import itertools
import math
from collections.abc import Callable, Sequence

from bitpress.report.html import Markup, tag

# In units of the SVG, which is as wide as its column: text stays readable on a phone.
WIDTH = 400
LABELS = 150
LINE = 20
HEIGHT = 190
# Around a plot with axes: left, right, top, bottom.
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34
SHADES = 6

Formatted = Callable[[float], str]


def figure(title: str, description: str, height: float, *shapes: Markup, width: int = WIDTH) -> Markup:
    """A plot with its caption; ``description`` is what is read out in its place."""
    drawing = tag(
        "svg", tag("title", description), *shapes,
        viewBox=f"0 0 {width} {height:g}", role="img", aria_label=description,
    )  # fmt: skip
    return tag("figure", tag("figcaption", title), drawing)


def bars(
    title: str, rows: Sequence[tuple[str, float]], form: Formatted, *, note: str = "", second: Sequence[float] = ()
) -> Markup:
    """A horizontal bar for each row; ``second`` are lighter ones behind them: what was before."""
    greatest = max([*(value for _, value in rows), *second, 1e-30])
    room, shapes = WIDTH - LABELS - 62, []
    for i, (label, value) in enumerate(rows):
        y = i * LINE
        shapes.append(_text(LABELS - 6, y + 14, shortened(label), anchor="end", full=label))
        if second:
            behind = max(1.0, room * second[i] / greatest)
            shapes.append(tag("rect", x=LABELS, y=y + 3, width=behind, height=LINE - 6, class_="behind"))
        width = max(1.0, room * value / greatest)
        shapes.append(tag("rect", x=LABELS, y=y + 5, width=width, height=LINE - 10, class_="bar"))
        end = max(width, room * second[i] / greatest if second else 0)
        shapes.append(_text(LABELS + end + 5, y + 14, form(value)))
    said = "; ".join(f"{label}: {form(value)}" for label, value in rows[:12])
    return figure(title, f"{title}. {note}{said}.", len(rows) * LINE + 4, *shapes)


def line(title: str, labels: Sequence[str], values: Sequence[float | None], form: Formatted, axis: str) -> Markup:
    """A value for each label, from left to right; where one is missing the line has a gap."""
    known = [(i, v) for i, v in enumerate(values) if v is not None]
    greatest = max([v for _, v in known] + [1e-30])
    step = (WIDTH - LEFT - RIGHT) / max(1, len(values) - 1)
    inside = HEIGHT - TOP - BOTTOM

    def place(i: int, value: float) -> tuple[float, float]:
        return LEFT + i * step, TOP + inside * (1 - value / ticks(greatest)[-1])

    shapes = [*_grid(greatest, form, place), *_labels_below(labels, step)]
    for _, run in itertools.groupby(enumerate(known), lambda pair: pair[1][0] - pair[0]):
        points = [place(*pair) for _, pair in run]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(tag("polyline", points=path, class_="line"))
    for i, value in known:
        x, y = place(i, value)
        told = tag("title", f"{labels[i]}: {form(value)}")
        shapes.append(tag("circle", told, cx=x, cy=y, r=2.5 if len(known) < 50 else 1.5, class_="point"))
    shapes.append(_text(WIDTH - RIGHT, HEIGHT - 4, axis, anchor="end"))
    ends = f"{labels[known[0][0]]}: {form(known[0][1])}; {labels[known[-1][0]]}: {form(known[-1][1])}" if known else ""
    most = max(known, key=lambda pair: pair[1], default=None)
    peak = f"; the most at {labels[most[0]]}: {form(most[1])}" if most else ""
    return figure(title, f"{title}. {ends}{peak}.", HEIGHT, *shapes)


def heat(
    title: str, rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[int, int], float], form: Formatted
) -> Markup:
    """A cell for each row and column, darker for greater values, on a logarithmic scale of six shades."""
    positive = [v for v in cells.values() if v > 0] or [1.0]
    low, high = math.log(min(positive)), math.log(max(positive))
    width = (WIDTH - LABELS - RIGHT) / max(1, len(columns))

    def shade(value: float) -> int:
        if value <= 0 or high <= low:
            return 0 if value <= 0 else SHADES - 1
        return min(SHADES - 1, int(SHADES * (math.log(value) - low) / (high - low)))

    shapes = [_text(LABELS - 6, i * LINE + 14, shortened(name), anchor="end", full=name) for i, name in enumerate(rows)]
    for (row, column), value in cells.items():
        told = tag("title", f"{rows[row]}, {columns[column]}: {form(value)}")
        x, y = LABELS + column * width, row * LINE + 1
        gap = 1 if width > 4 else 0
        shapes.append(
            tag("rect", told, x=x, y=y, width=width - gap, height=LINE - 2, class_=f"cell shade{shade(value)}")
        )
    bottom = len(rows) * LINE
    for column in sorted({0, len(columns) - 1}):
        anchor = "start" if column == 0 else "end"
        x = LABELS if column == 0 else LABELS + len(columns) * width
        shapes.append(_text(x, bottom + 14, shortened(columns[column], 16), anchor=anchor, full=columns[column]))
    for each in range(SHADES):
        x = LABELS + each * 40
        shapes.append(tag("rect", x=x, y=bottom + 24, width=39, height=10, class_=f"cell shade{each}"))
        if each % 2 == 0:
            shapes.append(_text(x, bottom + 46, f"≥ {form(math.exp(low + (high - low) * each / SHADES))}"))
    most = max(cells, key=lambda place: cells[place], default=None)
    said = f"The greatest is {rows[most[0]]} of {columns[most[1]]}: {form(cells[most])}" if most else ""
    return figure(title, f"{title}. {said}.", bottom + 52, *shapes)


def histogram(title: str, low: float, high: float, counts: Sequence[int], axis: str) -> Markup:
    """Bars of equal width from ``low`` to ``high``."""
    height, bottom, whole = 100, 84, 200
    width, greatest = (whole - 2 * RIGHT) / max(1, len(counts)), max([*counts, 1])
    shapes = [tag("line", x1=RIGHT, x2=whole - RIGHT, y1=bottom, y2=bottom, class_="axis")]
    for i, count in enumerate(counts):
        tall = (bottom - 4) * count / greatest
        at = low + (high - low) * (i + 0.5) / len(counts)
        told = tag("title", f"about {at:.3g}: {count}")
        shapes.append(
            tag(
                "rect", told, x=RIGHT + i * width, y=bottom - tall, width=max(0.5, width - 1), height=tall, class_="bar"
            )
        )
    for x, value, anchor in ((RIGHT, low, "start"), (whole - RIGHT, high, "end")):
        shapes.append(_text(x, height - 3, f"{value:.3g}", anchor=anchor))
    peak = low + (high - low) * (counts.index(greatest) + 0.5) / len(counts) if greatest in counts else low
    said = f"From {low:.3g} to {high:.3g}, most about {peak:.3g}"
    return figure(f"{title}: {axis}", f"{title}: {axis}. {said}.", height, *shapes, width=whole)


def ticks(greatest: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to ``greatest`` or just above."""
    if not greatest > 0 or not math.isfinite(greatest):
        return [0.0, 1.0]
    rough = greatest / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(greatest / step - 1e-9) + 1)]


def shortened(label: str, most: int = 25) -> str:
    """A label's end, which tells layers apart."""
    return label if len(label) <= most else f"…{label[1 - most :]}"


def _grid(greatest: float, form: Formatted, place: Callable[[int, float], tuple[float, float]]) -> list[Markup]:
    shapes = []
    for value in ticks(greatest):
        y = place(0, value)[1]
        shapes.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="axis" if value == 0 else "grid"))
        shapes.append(_text(LEFT - 5, y + 4, form(value), anchor="end"))
    return shapes


def _labels_below(labels: Sequence[str], step: float) -> list[Markup]:
    """The first and the last label."""
    if not labels:
        return []
    y = HEIGHT - BOTTOM + 15
    shapes = [_text(LEFT, y, shortened(labels[0]), full=labels[0])]
    if len(labels) > 1:
        last = shortened(labels[-1])
        shapes.append(_text(LEFT + (len(labels) - 1) * step, y, last, anchor="end", full=labels[-1]))
    return shapes


def _text(x: float, y: float, text: str, *, anchor: str | None = None, full: str | None = None) -> Markup:
    told = tag("title", full) if full is not None and full != text else None
    return tag("text", text, told, x=float(x), y=float(y), text_anchor=anchor)
