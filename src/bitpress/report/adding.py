"""What an evaluation adds to the report that lies beside a checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

from bitpress.checkpoints.card import write_card
from bitpress.checkpoints.directory import PAGE_FILE, REPORT_FILE
from bitpress.errors import BitpressError
from bitpress.report.page import page


def find_report(directory: Any) -> Path:
    """The report beside a checkpoint.

    Raises:
        BitpressError: there is none.
    """
    file = Path(directory) / REPORT_FILE if isinstance(directory, (str, os.PathLike)) else None
    if file is None or not file.is_file():
        raise BitpressError(f"report=True adds to the {REPORT_FILE} of a checkpoint: {directory!s} has none.")
    return file


def add_evaluation(file: Path, found: dict[str, Any]) -> None:
    """Put an evaluation into a report.json, and write the page and the card anew.

    Args:
        file: the report.json.
        found: :meth:`bitpress.Evaluation.to_dict`; what it says again replaces what was said before.
    """
    report = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in found.items() if name not in ("model", "original")}
    report["evaluation"] = {**report.get("evaluation", {}), **kept}
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (file.parent / PAGE_FILE).write_text(page(report), encoding="utf-8")
    write_card(file.parent)
