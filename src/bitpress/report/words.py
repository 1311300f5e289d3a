"""Figures of a report as people read them."""

import re
from typing import Any

# From here on no percentage is read.
MANY_TIMES = 1e4


def percent(share: float) -> str:
    """Three digits of a share, as percent: "0.423 %"."""
    return f"{100 * share:.3g} %" if share < MANY_TIMES else f"{share:.1e} ×"


def size(count: float) -> str:
    """Bytes, in the unit that fits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def duration(seconds: float) -> str:
    """Seconds, or minutes and hours of many."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def scheme(figures: dict[str, Any]) -> str:
    """A layer's grid: "int4, groups of 128, asymmetric"."""
    kind = f"{figures.get('type', 'int')}{figures.get('bits', '')}"
    strategy, count = figures.get("strategy", ""), figures.get("group_size")
    grid = f"groups of {count}" if strategy in ("group", "tensor_group") and count else f"per {strategy}"
    points = "" if figures.get("type") == "float" else ", symmetric" if figures.get("symmetric") else ", asymmetric"
    return f"{kind}, {grid}{points}" if strategy else kind


def role(name: str, block: str) -> str:
    """What a layer is in its block, the numbers of experts left out: "mlp.experts.*.up_proj"."""
    local = name.removeprefix(f"{block}.") if block else name
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", local)


def error_of(figures: dict[str, Any]) -> float | None:
    """A layer's error: of its output, or where that is not known of its weight."""
    found: float | None = figures.get("relative_error", figures.get("weight_error"))
    return found


def outlier_of(figures: dict[str, Any]) -> float | None:
    """How many times the median channel of a layer's input the largest one is."""
    found = figures.get("input")
    ratio: float | None = found["largest"] / found["median"] if found and found["median"] > 0 else None
    return ratio
