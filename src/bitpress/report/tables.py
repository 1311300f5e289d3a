"""The report's tables: mappings, all layers, before and after, recipe and versions."""

import json
from collections.abc import Mapping
from typing import Any

from bitpress.report.html import Child, Markup, folded, table, tag
from bitpress.report.words import outlier_of, percent, scheme, size

Report = dict[str, Any]


def mappings(report: Report) -> list[Markup]:
    """Which layers have taken scales from which, how that was proven, and what it won."""
    found, left = report.get("mappings", []), report.get("layers_without_mapping", {})
    if not found and not left:
        return []
    rows = [
        (
            each["smooth_layer"],
            ", ".join(each["balance_layers"]),
            each.get("source", ""),
            f"{each['proof']:.1e}",
            _won(each),
        )
        for each in found
    ]
    worst = max((each["proof"] for each in found), default=0.0)
    parts = [
        tag(
            "p",
            f"{len(found)} mappings were applied. The proof is the greatest relative change of the block's output "
            f"under random scales, which must be no more than rounding: {worst:.1e} at most.",
        )
    ]
    if rows:
        head = ("smooth layer", "balance layers", "found by", "proof", "error left")
        parts.append(folded("All mappings", table("Mappings", head, rows, 2)))
    if left:
        parts.append(folded(f"{len(left)} layers without a mapping, and why",
                            table("Layers without a mapping", ("layer", "why"), left.items())))  # fmt: skip
    return parts


def _won(mapping: Mapping[str, Any]) -> str:
    """The share of the error that is left."""
    before, after = mapping.get("error_before"), mapping.get("error")
    return percent(after / before) if before and after is not None else "–"


def all_layers(report: Report) -> list[Markup]:
    """Every quantized layer, with all that is known of it."""
    rows = [
        (
            name,
            " × ".join(map(str, each.get("shape", ()))),
            scheme(each),
            _share(each.get("relative_error")),
            _share(each.get("weight_error")),
            _ratio(outlier_of(each)),
            size(each["dense_bytes"]) if "dense_bytes" in each else "–",
            size(each["stored_bytes"]),
        )
        for name, each in report["layers"].items()
    ]
    head = ("layer", "shape", "scheme", "output error", "weight error", "outlier", "before", "after")
    parts: list[Markup] = [folded(f"The {len(rows)} layers", table("All layers", head, rows, 5))]
    states = [(name, json.dumps(each)) for name, each in report.get("attentions", {}).items()]
    if states:
        parts.append(
            folded("Attentions whose states are quantized", table("Attentions", ("attention", "grid"), states))
        )
    few = [(name, f"{count:,}") for name, count in report.get("experts_with_few_tokens", {}).items()]
    if few:
        parts.append(folded(f"{len(few)} layers of experts that saw few tokens, and were solved with those of all",
                            table("Experts with few tokens", ("layer", "tokens"), few, 1)))  # fmt: skip
    return parts


def allocations(report: Report) -> list[Markup]:
    """What modifiers that choose schemes have chosen; what distillation brought."""
    return [
        folded(title, tag("pre", json.dumps(found, indent=2)))
        for title, found in (
            ("Chosen schemes", report.get("allocations")),
            ("Distillation", report.get("distillation")),
        )
        if found
    ]


def evaluation(report: Report) -> list[Markup]:
    """Perplexity and continuations, where an evaluation has added them."""
    found = report.get("evaluation", {})
    rows: list[tuple[str, Child, Child]] = []
    text, beside = found.get("perplexity"), found.get("agreement", {})
    if text:
        original = beside.get("original_perplexity")
        rows.append(("perplexity", "–" if original is None else f"{original:.4f}", f"{text['perplexity']:.4f}"))
    if beside:
        rows.append(("KL divergence from the original, nats a token", "–", f"{beside['divergence']:.5f}"))
        rows.append(("same token on top", "–", percent(beside["top1"])))
    parts: list[Markup] = []
    if rows:
        tokens = f"Over {text['tokens']:,} tokens" if text else "Evaluation"
        parts.append(table(tokens, ("", "original", "compressed"), rows, 2))
    for each in found.get("continuations", []):
        parts += _continuations(each)
    return parts


def _continuations(each: Mapping[str, Any]) -> list[Markup]:
    """A prompt with what was said before and after; from where they differ the latter is marked."""
    before, after = each.get("original"), each["model"]
    same = 0
    while before is not None and same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    marked = [after] if before is None else [after[:same], tag("span", after[same:], class_="changed")]
    parts = [tag("h3", "Prompt"), tag("blockquote", each["prompt"])]
    if before is not None:
        parts += [tag("p", "The original goes on:", class_="soft"), tag("blockquote", before)]
    said = "The compressed model says the same:" if before == after else "The compressed model:"
    return [*parts, tag("p", said, class_="soft"), tag("blockquote", *marked)]


def origin(report: Report) -> list[Markup]:
    """The recipe, and what made the checkpoint."""
    parts = [tag("pre", tag("code", report["recipe"]))] if report.get("recipe") else []
    rows = list(report.get("versions", {}).items())
    return [*parts, table("Versions", ("library", "version"), rows)]


def _share(error: float | None) -> str:
    return "–" if error is None else percent(error)


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3g} ×"
