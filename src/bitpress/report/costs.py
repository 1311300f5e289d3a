"""What the layers take on the disk, and what the run took."""

from typing import Any

from bitpress.report import plots
from bitpress.report.html import Markup, table, tag
from bitpress.report.words import duration, role, size

Report = dict[str, Any]
PHASES = {
    "dry run": "one small batch, to find the order of the blocks",
    "proofs": "finding the mappings, and proving them",
    "measure": "gradients, for the budget",
    "calibrate": "forwards that fill the statistics",
    "solve": "the modifiers' own work",
    "propagate": "forwards with new weights",
    "learn": "learning how blocks are rounded",
    "distill": "tuning the scales",
}


def sizes(report: Report) -> list[Markup]:
    """Bytes before and after, by kind of layer and in all."""
    kinds: dict[str, list[int]] = {}
    of_block = {name: block for block, each in report.get("blocks", {}).items() for name in each.get("layers", ())}
    for name, figures in report["layers"].items():
        sums = kinds.setdefault(role(name, of_block.get(name, "")), [0, 0, 0])
        sums[0] += 1
        sums[1] += figures.get("dense_bytes", 0)
        sums[2] += figures["stored_bytes"]
    kinds = dict(sorted(kinds.items(), key=lambda pair: -pair[1][2]))
    rows: list[tuple[str, str, str, str]] = [(k, str(n), size(b), size(a)) for k, (n, b, a) in kinds.items()]
    counted = str(report["quantized_layers"])
    rows.append(
        ("all quantized layers", counted, size(report["weight_bytes_before"]), size(report["weight_bytes_after"]))
    )
    if "model_bytes_before" in report:
        rest = report["model_bytes_before"] - report["weight_bytes_before"]
        rows.append(("what is not quantized", "", size(rest), size(rest)))
        rows.append(("the whole model", "", size(report["model_bytes_before"]), size(report["model_bytes_after"])))
    parts = [table("Bytes before and after", ("layers", "number", "before", "after"), rows, 3)]
    if any(before for _, before, _ in kinds.values()):
        bars = [(kind, float(after)) for kind, (_, _, after) in list(kinds.items())[:16]]
        behind = [float(before) for _, before, _ in list(kinds.values())[:16]]
        parts.insert(0, plots.bars("Bytes by kind of layer: before (pale), and as stored", bars, size, second=behind))
    return [tag("div", *parts, class_="plots")]


def phases(report: Report) -> list[Markup]:
    """Seconds and memory of each phase."""
    seconds, resident = report["seconds"], report.get("resident_bytes", {})
    if not seconds:
        return []
    rows = [
        (
            phase,
            duration(spent),
            size(resident[phase]) if resident.get(phase) else "–",
            tag("span", PHASES.get(phase, "")),
        )
        for phase, spent in seconds.items()
    ]
    head = ("phase", "time", "memory", "what it does")
    note = f"Compressed by {report['ranks']} processes together. " if "ranks" in report else ""
    return [
        tag("p", f"{note}Memory is the most that the process held at the end of a step of the phase, model and all."),
        tag(
            "div",
            plots.bars("Time by phase", [*seconds.items()], duration),
            table("Time and memory by phase", head, rows),
            class_="plots",
        ),
    ]
