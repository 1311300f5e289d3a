"""The report's plots of errors: across the network, by layer, and what the inputs are like."""

from typing import Any

from bitpress.report import plots
from bitpress.report.html import Markup, folded, joined, table, tag
from bitpress.report.words import error_of, outlier_of, percent, role

Report = dict[str, Any]

SHOWN = 12
# So many columns a heat map can have and be seen on a phone.
MOST_COLUMNS = 128


def measure(report: Report) -> str:
    """What a layer's error in this report is relative to."""
    known = any("relative_error" in figures for figures in report["layers"].values())
    return "of its output's square" if known else "of its weight's square"


def ranked(report: Report) -> list[tuple[str, float]]:
    """Layers with their errors, the greatest first."""
    found = [(name, error_of(figures)) for name, figures in report["layers"].items()]
    return sorted([(name, error) for name, error in found if error is not None], key=lambda pair: -pair[1])


def network(report: Report) -> list[Markup]:
    """How far the output of each block is off."""
    blocks = report.get("blocks", {})
    known = {name: each for name, each in blocks.items() if "accumulated_error" in each or "own_error" in each}
    if not known:
        return []
    names = list(known)
    kinds = (
        ("accumulated_error", "Error of what each block hands on, with all blocks before it compressed"),
        ("own_error", "Error that each block adds by itself"),
    )
    drawn = [
        plots.line(title, names, [known[n].get(kind) for n in names], percent, "blocks, in their order")
        for kind, title in kinds
        if any(kind in each for each in known.values())
    ]
    rows = [(n, *(percent(known[n][k]) if k in known[n] else "–" for k, _ in kinds)) for n in names]
    return [
        tag(
            "p",
            "The squared error of a block's output at one position, relative to the output's own square, in the mean "
            "over the positions of the first calibration batch; beside it goes the original model.",
        ),
        tag("div", *drawn, class_="plots"),
        folded("The figures of each block", table("Errors of blocks", ("block", "accumulated", "its own"), rows, 2)),
        *_learned(blocks),
    ]


def _learned(blocks: dict[str, Any]) -> list[Markup]:
    """What learning how blocks are rounded has brought, on the batches that were held out."""
    known = {name: each for name, each in blocks.items() if "learned_error" in each}
    if not known:
        return []
    rows = []
    for name, each in known.items():
        solved, learned = each["solved_error"], each["learned_error"]
        rows.append((name, percent(solved), percent(learned), "yes" if learned < solved else "no"))
    heads = ("block", "as it was solved", "learned", "kept")
    return [folded("What learning the rounding brought", table("Errors of held-out batches", heads, rows, 2))]


def by_layer(report: Report) -> list[Markup]:
    """Which layers are affected most, and where they are."""
    found = ranked(report)
    if not found:
        return []
    what = "output on the calibration data" if measure(report).startswith("of its out") else "weight"
    parts = [plots.bars("The most affected layers", found[:SHOWN], percent)]
    places = _places(report)
    if places is not None:
        parts.append(plots.heat("Error by block and layer", *places, percent))
    estimate = (
        "It is estimated from every fourth row of the weight" if what.startswith("output") else "It is an estimate"
    )
    return [
        tag("p", f"The squared error of a layer's {what}, relative to its square. {estimate}."),
        tag("div", *parts, class_="plots"),
    ]


def _places(report: Report) -> tuple[list[str], list[str], dict[tuple[int, int], float]] | None:
    """Rows (what a layer is), columns (blocks) and errors: of several layers of one place the greatest."""
    cells: dict[tuple[str, str], float] = {}
    for block, members in report.get("blocks", {}).items():
        for name in members.get("layers", ()):
            error = error_of(report["layers"].get(name, {}))
            if error is not None:
                place = (role(name, block), block)
                cells[place] = max(cells.get(place, 0.0), error)
    columns = list(dict.fromkeys(block for _, block in cells))
    rows = list(dict.fromkeys(what for what, _ in cells))
    if not 1 < len(columns) <= MOST_COLUMNS:
        return None
    return rows, columns, {(rows.index(r), columns.index(c)): error for (r, c), error in cells.items()}


def outliers(report: Report) -> list[Markup]:
    """Inputs with channels that are far larger than the others."""
    ratios = {name: outlier_of(figures) for name, figures in report["layers"].items()}
    found: dict[tuple[float, float], tuple[str, float]] = {}
    for name, ratio in ratios.items():
        if ratio is not None:
            channels = report["layers"][name]["input"]
            # Layers that share their input share its figures: the first is shown.
            found.setdefault((channels["largest"], channels["median"]), (name, ratio))
    if not found:
        return []
    largest = sorted(found.values(), key=lambda pair: -pair[1])[:SHOWN]
    return [
        tag(
            "p",
            "Of each layer's input, before any smoothing, the root mean square of the largest channel against that of "
            "the median one. What is hard to quantize has few channels that are far larger than the rest.",
        ),
        plots.bars("Largest channel, in median channels", largest, lambda value: f"{value:.3g} ×"),
    ]


def spreads(report: Report) -> list[Markup]:
    """Histograms of the worst layers."""
    drawn = []
    for name, kinds in report.get("histograms", {}).items():
        for kind, axis in (("weights", "weights"), ("scales", "scales, log₂")):
            spread = kinds[kind]
            drawn.append(plots.histogram(name, spread["low"], spread["high"], spread["counts"], axis))
    if not drawn:
        return []
    return [
        tag("p", "The values that ship, and their scales as powers of 2; of sixteen rows of each layer."),
        tag("div", joined(drawn), class_="plots small"),
    ]
