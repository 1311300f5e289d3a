"""What each modifier won: the error of rounding to nearest, and after each step."""

from statistics import median
from typing import Any

from bitpress.report import plots
from bitpress.report.errors import ranked
from bitpress.report.html import Markup, table, tag
from bitpress.report.words import percent, role

SHOWN = 12
NAMES = {"nearest": "rounded to nearest"}


def won(report: dict[str, Any]) -> list[Markup]:
    """The steps of the median layer, of each kind of layer, and of the worst ones."""
    layers = {name: figures["steps"] for name, figures in report["layers"].items() if figures.get("steps")}
    order = list(dict.fromkeys(step for each in layers.values() for step in each))
    if len(order) < 2:
        return []
    shown = [NAMES.get(step, step) for step in order]
    medians = [(NAMES.get(s, s), median([each[s] for each in layers.values() if s in each])) for s in order]
    worst = [name for name, _ in ranked(report) if name in layers][:SHOWN]
    last = order[-1]
    behind = [layers[name][order[0]] for name in worst]
    bars = [(name, layers[name].get(last, layers[name][order[0]])) for name in worst]
    kinds: dict[str, list[dict[str, float]]] = {}
    for block, members in report.get("blocks", {}).items():
        for name in members.get("layers", ()):
            if name in layers:
                kinds.setdefault(role(name, block), []).append(layers[name])
    rows = [(kind, *(_median(each, step) for step in order), _left(each, order)) for kind, each in kinds.items()]
    rows += [(name, *(_median([layers[name]], step) for step in order), _left([layers[name]], order)) for name in worst]
    return [
        tag(
            "p",
            "The squared error of a layer's output, relative to its square: if it were rounded to nearest at "
            "once, after each modifier, and as it is stored. All from the same few rows of the weight, 32 to 128.",
        ),
        tag(
            "div",
            plots.bars("Error of the median layer, step by step", medians, percent),
            plots.bars(
                f"The most affected layers: {NAMES['nearest']} (pale), and as stored", bars, percent, second=behind
            ),
            class_="plots",
        ),
        table("Errors at each step: the median of each kind of layer, then the most affected",
              ("layer", *shown, "left of the first"), rows, len(order) + 1),
    ]  # fmt: skip


def _median(layers: list[dict[str, float]], step: str) -> str:
    known = [each[step] for each in layers if step in each]
    return percent(median(known)) if known else "–"


def _left(layers: list[dict[str, float]], order: list[str]) -> str:
    """What share of the first error is left at the end."""
    shares = [each[order[-1]] / each[order[0]] for each in layers if each.get(order[0]) and order[-1] in each]
    return percent(median(shares)) if shares else "–"
