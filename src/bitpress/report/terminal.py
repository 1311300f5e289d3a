"""The figures of report.json in the terminal, short."""

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from bitpress.checkpoints.directory import REPORT_FILE
from bitpress.errors import BitpressError
from bitpress.report.describing import size

PAGE = "report.html"
# The fields of a layer that say how bad it is, the best of them first, and what they are relative to.
ERRORS = {"relative_error": "of its output", "weight_error": "of its weight"}


def read_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The report beside a checkpoint.

    Args:
        directory: of the checkpoint, or the file itself.

    Raises:
        BitpressError: there is none, or it is no JSON object.
    """
    path = Path(directory).expanduser()
    file = path if path.suffix == ".json" else path / REPORT_FILE
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BitpressError(
            f"{file} does not exist: oneshot writes it beside a checkpoint. `bitpress inspect {path}` shows what one "
            "without a report holds."
        ) from error
    except (OSError, ValueError) as error:
        raise BitpressError(f"{file} cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise BitpressError(f"{file} is no JSON object: it is no report of bitpress.")
    return report


def short(report: Mapping[str, Any], worst: int = 5) -> dict[str, Any]:
    """The figures of a report that matter most; those are absent of which the report says nothing.

    Returns:
        ``layers``, ``bytes`` (before, after), ``bits_per_weight``, ``samples``, ``tokens``, ``seconds`` by phase,
        ``mappings``, ``worst`` (name to error) with ``error`` naming which, ``warnings`` and ``versions``.
    """
    layers: Mapping[str, Mapping[str, Any]] = report.get("layers") or {}
    after = report.get("weight_bytes_after")
    weights = sum(prod(layer["shape"]) for layer in layers.values() if layer.get("shape"))
    kind = next((each for each in ERRORS if any(each in layer for layer in layers.values())), None)
    found: dict[str, Any] = {
        "layers": report.get("quantized_layers", len(layers) or None),
        "bytes": {"before": report.get("weight_bytes_before"), "after": after} if after else None,
        "bits_per_weight": 8 * after / weights if after and weights else None,
        **{name: report.get(name) for name in ("pipeline", "samples", "tokens", "seconds", "ranks")},
        "mappings": len(report["mappings"]) if "mappings" in report else None,
        "error": kind,
        "worst": _worst(layers, kind, worst),
        "warnings": _warnings(report),
        "versions": report.get("versions"),
    }
    return {name: value for name, value in found.items() if value not in (None, {}, [])}


def _worst(layers: Mapping[str, Mapping[str, Any]], kind: str | None, count: int) -> dict[str, float]:
    if kind is None:
        return {}
    known = {name: float(layer[kind]) for name, layer in layers.items() if layer.get(kind) is not None}
    return dict(sorted(known.items(), key=lambda item: -item[1])[:count])


def _warnings(report: Mapping[str, Any]) -> list[str]:
    found = []
    few = report.get("experts_with_few_tokens") or {}
    if few:
        found.append(f"{len(few)} layers of experts saw few tokens: more samples reach more of them")
    left = report.get("layers_without_mapping") or {}
    if left and report.get("mappings"):
        found.append(f"{len(left)} layers have no mapping: `bitpress mappings` says why")
    return found


def render(directory: str | os.PathLike[str], report: Mapping[str, Any], worst: int = 5) -> RenderableType:
    """:func:`short`, for people."""
    figures = short(report, worst)
    lines = [*_lines(figures), *figures.get("warnings", [])]
    parts: list[RenderableType] = [escape(line) for line in lines]
    if "worst" in figures:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("layers that lost most", no_wrap=True)
        table.add_column(f"relative squared error {ERRORS[figures['error']]}", justify="right")
        for name, error in figures["worst"].items():
            table.add_row(escape(name), f"{error:.2e}")
        parts.append(table)
    page = Path(directory).expanduser() / PAGE
    if page.is_file():
        parts.append(escape(f"More, with plots: {page}"))
    return Group(*parts)


def _lines(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    if "bytes" in figures:
        before, after = figures["bytes"]["before"], figures["bytes"]["after"]
        times = f"{size(before)} → {size(after)}, {before / after:.2f} times smaller" if before else size(after)
        bits = f", {figures['bits_per_weight']:.2f} bits a weight" if "bits_per_weight" in figures else ""
        lines.append(f"{figures.get('layers', 0)} layers: {times}{bits}")
    if figures.get("samples"):
        ranks = f" on {figures['ranks']} ranks" if "ranks" in figures else ""
        mappings = f", {figures['mappings']} mappings" if figures.get("mappings") else ""
        lines.append(
            f"calibrated with {figures['samples']} samples, {figures.get('tokens', 0):,} tokens{ranks}{mappings}"
        )
    seconds = figures.get("seconds", {})
    if seconds:
        parts = ", ".join(f"{phase} {taken:.1f} s" for phase, taken in sorted(seconds.items(), key=lambda i: -i[1]))
        lines.append(f"{sum(seconds.values()):.1f} s: {parts}")
    if "versions" in figures:
        lines.append(", ".join(f"{name} {version}" for name, version in figures["versions"].items()))
    return lines
