"""The model card, README.md: what a checkpoint is, how good, and what reads it, as the files beside it say."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import ModelCardData

from bitpress.checkpoints.directory import (
    CARD_FILE,
    CARD_MARK,
    CONFIG_FILE,
    PAGE_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    SECOND_CARD,
    is_own_card,
)
from bitpress.checkpoints.served import Readers, readers
from bitpress.checkpoints.unknown import Unknown

# The hub's task of what a transformers class does, by how its name ends; others do several.
TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
GIGABYTE = 1e9
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = ("*.safetensors", "*.gguf")
# Layers that are listed with their errors.
SHOWN = 5


def write_card(directory: Path) -> None:
    """Write README.md, from the config, recipe and report in ``directory``.

    A README.md that is there and not bitpress's own stays; the card is README.bitpress.md then.
    """
    theirs = (directory / CARD_FILE).is_file() and not is_own_card(directory / CARD_FILE)
    card = make_card(directory)
    (directory / (SECOND_CARD if theirs else CARD_FILE)).write_text(card, encoding="utf-8")


def renew_card(directory: Path) -> None:
    """The card of another format says another use; without a report there is nothing to say."""
    if (directory / REPORT_FILE).is_file():
        write_card(directory)


def make_card(directory: Path) -> str:
    """The card's text; see :func:`write_card`."""
    config, report = _json(directory / CONFIG_FILE), _json(directory / REPORT_FILE)
    found = readers(
        config,
        gguf=any(directory.glob("*.gguf")),
        known=report.get("model", {}).get("class") != Unknown.__name__,
        by_transformers=report.get("loads_in_transformers", True),
    )
    recipe = directory / RECIPE_FILE
    parts = [
        f"---\n{_front_matter(config, report, found)}\n---\n\n{CARD_MARK}",
        *_introduction(report, found),
        *_use(found),
        *_figures(report, directory, packed=found.packed),
        *(_recipe(recipe.read_text(encoding="utf-8")) if recipe.is_file() else ()),
        *_versions(report, page=(directory / PAGE_FILE).is_file()),
    ]
    return "\n\n".join(parts) + "\n"


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _front_matter(config: dict[str, Any], report: dict[str, Any], found: Readers) -> str:
    name = report.get("model", {}).get("name", "")
    named = bool(HUB_ID.fullmatch(name))
    architecture = (config.get("architectures") or [report.get("model", {}).get("class", "")])[0]
    data = ModelCardData(
        base_model=name if named else None,
        base_model_relation="quantized" if named else None,
        library_name=found.library,
        pipeline_tag=next((task for end, task in TASKS.items() if architecture.endswith(end)), None),
        tags=["bitpress", *([found.format] if found.format else [])],
    )
    text: str = data.to_yaml()
    return text


def _introduction(report: dict[str, Any], found: Readers) -> Iterator[str]:
    model = report.get("model", {})
    name = model.get("name") or model.get("class") or "Model"
    yield f"# {_plain(name)}, compressed"
    stored = f" Stored as {found.format}." if found.format else " Stored dense, with the values of the grids."
    kinds = sorted({_grid(layer) for layer in report.get("layers", {}).values() if "type" in layer})
    yield (
        f"{_plain(name)} with {report.get('quantized_layers', 0)} layers quantized by bitpress"
        f"{': ' + '; '.join(kinds) if kinds else ''}.{stored}"
    )


def _grid(layer: dict[str, Any]) -> str:
    kind = "float" if layer["type"] == "float" else "integer"
    of = {"group": f"groups of {layer['group_size']}", "tensor_group": f"groups of {layer['group_size']}"}
    where = of.get(layer["strategy"], f"a scale per {layer['strategy']}")
    points = "" if kind == "float" else ", symmetric" if layer["symmetric"] else ", with zero points"
    return f"{layer['bits']}-bit {kind}s, {where}{points}"


def _use(found: Readers) -> Iterator[str]:
    yield "## How to use it"
    if found.lines:
        yield "Here `.` is the directory with this file; its path, or the hub id, does as well."
    for line, code, language in found.lines:
        yield f"{line}\n\n```{language}\n{code}\n```"
    yield from found.notes


def _figures(report: dict[str, Any], directory: Path, *, packed: bool) -> Iterator[str]:
    """``packed`` if the quantized weights take the bytes that the report counts."""
    if "bits_per_weight" not in report:
        return  # none, or one of an older bitpress
    stored = sum(file.stat().st_size for kind in WEIGHTS for file in directory.glob(kind))
    rows = [("files of weights", _size(report["model_bytes_before"]), _size(stored))]
    if packed:
        rows.insert(0, ("quantized weights", _size(report["weight_bytes_before"]), _size(report["weight_bytes_after"])))
    yield "## Figures"
    table = ["| | before | after |", "| --- | --- | --- |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    yield "\n".join(table)
    if packed:
        yield f"Quantized weights take {report['bits_per_weight']:.3g} bits each, scales and zero points included."
    yield from _errors(report["layers"])
    yield from _evaluated(report.get("evaluation", {}))


def _errors(layers: dict[str, dict[str, Any]]) -> Iterator[str]:
    errors = {name: each["relative_error"] for name, each in layers.items() if "relative_error" in each}
    if not errors:
        return
    worst = sorted(errors, key=lambda name: -errors[name])[:SHOWN]
    yield (
        "Squared error of a layer's output on the calibration data, relative to the output's square: "
        f"{median(errors.values()):.2%} in the median of {len(errors)} layers. The most affected:"
    )
    lines = ["| layer | error |", "| --- | --- |", *(f"| {_code(name)} | {errors[name]:.2%} |" for name in worst)]
    yield "\n".join(lines)


def _evaluated(found: dict[str, Any]) -> Iterator[str]:
    if "perplexity" not in found:
        return
    beside = found.get("agreement", {}).get("original_perplexity")
    original = "" if beside is None else f", the original {beside:.4g}"
    text = found["perplexity"]
    yield f"Perplexity {text['perplexity']:.4g}{original}, over {text['tokens']} tokens of an evaluation."


def _recipe(text: str) -> Iterator[str]:
    yield "## Recipe"
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    yield f"{fence}yaml\n{text.strip()}\n{fence}"


def _versions(report: dict[str, Any], *, page: bool) -> Iterator[str]:
    if not report:
        return
    used = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    data = f" Calibrated with {report['tokens']} tokens of {report['samples']} samples." if report["tokens"] else ""
    where = " All figures are in [report.html](report.html) and [report.json](report.json)." if page else ""
    yield f"Made with {used}.{data}{where}"


def _size(count: int) -> str:
    return f"{count / GIGABYTE:.2f} GB" if count >= GIGABYTE else f"{1000 * count / GIGABYTE:.2f} MB"


def _plain(text: str) -> str:
    """A name as Markdown shows it, whatever it holds."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A name as code in a table."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '&#124;')}`"
