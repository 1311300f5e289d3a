"""report.html: the whole report as one file, which needs nothing else, from what report.json holds."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from bitpress.report import costs, errors, steps
from bitpress.report.html import Markup, joined, tag
from bitpress.report.tables import all_layers, allocations, evaluation, mappings, origin
from bitpress.report.words import duration, percent, size

Report = dict[str, Any]

# Each section's anchor, heading, and what makes it; one that makes nothing is left out.
SECTIONS: tuple[tuple[str, str, Callable[[Report], list[Markup]]], ...] = (
    ("network", "Across the network", errors.network),
    ("layers", "Error by layer", errors.by_layer),
    ("steps", "What each modifier won", steps.won),
    ("outliers", "Outliers among the inputs", errors.outliers),
    ("spread", "Values and scales of the most affected layers", errors.spreads),
    ("bytes", "Bytes", costs.sizes),
    ("outputs", "Before and after", evaluation),
    ("mappings", "Mappings and their proofs", mappings),
    ("budget", "Bits by budget", allocations),
    ("time", "Time and memory", costs.phases),
    ("all", "All layers", all_layers),
    ("origin", "Recipe and versions", origin),
)


def page(report: Report) -> str:
    """The page of a report: HTML that loads nothing, runs no script, and fits a phone and the dark.

    Args:
        report: what :func:`bitpress.report.summarize` made; see docs/report.md. What it does not hold is left out.
    """
    title = f"{_name(report)}, compressed"
    made = [(anchor, heading, make(report)) for anchor, heading, make in SECTIONS]
    sections = [tag("section", tag("h2", heading), *parts, id=anchor) for anchor, heading, parts in made if parts]
    links = [tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, heading, parts in made if parts]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        ),
        tag("title", title),
        tag("style", Markup(files("bitpress.report").joinpath("page.css").read_text(encoding="utf-8"))),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", _subtitle(report), class_="soft"), _figures(report)),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", joined(sections, "\n")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _name(report: Report) -> str:
    model = report.get("model", {})
    return str(model.get("name") or model.get("class") or "a model")


def _subtitle(report: Report) -> str:
    tokens, samples = report.get("tokens"), report.get("samples")
    data = f"calibrated with {tokens:,} tokens of {samples:,} samples" if tokens else "no calibration data"
    kind = report.get("model", {}).get("class", "")
    return f"{kind + ', ' if kind else ''}{report['quantized_layers']} layers quantized, {data}."


def _figures(report: Report) -> Markup:
    before, after = report["weight_bytes_before"], report["weight_bytes_after"]
    found = [("quantized weights", size(after), f"of {size(before)}: {percent(after / max(1, before))}")]
    if "model_bytes_after" in report:
        found.append(("whole model", size(report["model_bytes_after"]), f"of {size(report['model_bytes_before'])}"))
    if "bits_per_weight" in report:
        found.append(("bits per weight", f"{report['bits_per_weight']:.3g}", "with scales and zero points"))
    ranked = errors.ranked(report)
    if ranked:
        middle = ranked[len(ranked) // 2]
        found.append(("error of the median layer", percent(middle[1]), errors.measure(report)))
        found.append(("most affected", percent(ranked[0][1]), ranked[0][0]))
    text = report.get("evaluation", {}).get("perplexity")
    if text:
        found.append(("perplexity", f"{text['perplexity']:.4g}", f"over {text['tokens']:,} tokens"))
    found.append(("time", duration(sum(report["seconds"].values())), report["pipeline"]))
    cards = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", more) if more else None))
        for name, value, more in found
    ]
    return tag("dl", *cards, class_="figures")
