"""From a name (a file, a saved folder, a dataset on the hub) and its splits to the data."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitpress.errors import BitpressError, nearest_file
from bitpress.pipelines.data.known import KNOWN, Known

Splits = str | Sequence[str] | Mapping[str, str] | None

READABLE = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
# Suffixes that no name on the hub is likely to end in.
FILE_SUFFIXES = (*READABLE, *PICKLES, ".arrow", ".gz", ".md", ".npy", ".npz", ".safetensors", ".tsv", ".zip", ".zst")
# The split of a file, as in `datasets`.
DEFAULT_SPLIT = "train"


def load_named(name: str | os.PathLike[str], splits: Splits, *, whole: bool, config: str | None = None) -> Any:
    """Load what a name stands for.

    Args:
        name: A path, or a dataset's name on the hub.
        splits: Which part of a Hugging Face dataset, as in `select_split`.
        whole: Read a .txt file as one text instead of one per line.
        config: The configuration of a dataset on the hub.

    Returns:
        A list of texts or rows, which has no splits, or a Hugging Face dataset cut to `splits`.

    Raises:
        BitpressError: There is no such file or dataset, or it cannot be read.
    """
    path = Path(name).expanduser()
    if _exists(path):
        loaded = _load_folder(path) if path.is_dir() else _load_file(path, whole=whole)
        return loaded if isinstance(loaded, list) else select_split(loaded, splits, f"the dataset {str(path)!r}")
    if isinstance(name, os.PathLike) or _looks_like_a_file(name):
        raise BitpressError(
            f"the dataset file {str(name)!r} does not exist{nearest_file(Path(name)) or ': check the path'}"
        )
    return _load_from_hub(name, splits, config)


def select_split(dataset: Any, splits: Splits, where: str) -> Any:
    """Choose the part of a Hugging Face dataset that calibrates.

    Args:
        dataset: A `Dataset`, an `IterableDataset` or a dict of either.
        splits: What the user asked for; None takes "calibration", "train" or the only split.
        where: What messages call the dataset.

    Raises:
        BitpressError: There is no such split, or none to prefer.
    """
    import datasets  # noqa: PLC0415

    if splits is None and not isinstance(dataset, Mapping):
        return dataset
    parts = dict(dataset) if isinstance(dataset, Mapping) else {str(dataset.split or DEFAULT_SPLIT): dataset}
    if splits is not None:
        chosen = [part for spec in _split_names(splits) for part in _parts(parts, spec, where)]
        return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
    for name in ("calibration", DEFAULT_SPLIT):
        if name in parts:
            return parts[name]
    if len(parts) == 1:
        return next(iter(parts.values()))
    if not parts:
        raise BitpressError(f"{where} is empty: it has no splits")
    raise BitpressError(f"{where} has the splits {', '.join(parts)}; choose one with splits=")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or a null byte in it: not a path
        return False


def _looks_like_a_file(name: str) -> bool:
    """Whether a name can only be a path: names on the hub are `name` or `owner/name`, dots allowed."""
    if "\\" in name or name.count("/") > 1 or name.startswith(("/", ".", "~")) or name.endswith("/"):
        return True
    suffix = Path(name).suffix.lower()
    return suffix in FILE_SUFFIXES or ("/" not in name and suffix != "")


def _load_file(path: Path, *, whole: bool) -> Any:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise BitpressError(
            f"{path} looks like a pickle, which bitpress never loads: it can run any code; "
            f"load it yourself and pass the object, or save it as one of {', '.join(READABLE)}"
        )
    if suffix not in READABLE:
        raise BitpressError(f"{path} cannot be read as a dataset; use one of {', '.join(READABLE)}, or a saved folder")
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        if suffix == ".csv":
            return _read_csv(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise BitpressError(f"{path} cannot be read as {suffix}: {error}") from error
    if suffix == ".txt":
        return [text] if whole else [line for line in text.splitlines() if line.strip()]
    return _parse_json(text, path)


def _read_parquet(path: Path) -> Any:
    import datasets  # noqa: PLC0415
    from pyarrow import parquet  # type: ignore[import-untyped]  # noqa: PLC0415

    return datasets.Dataset(parquet.read_table(path))


def _read_csv(path: Path) -> list[dict[str, str]]:
    # The default limit of 128 KiB is shorter than a long document.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    finally:
        csv.field_size_limit(limit)


def _parse_json(text: str, path: Path) -> list[Any]:
    # Many .json files hold lines, too.
    if path.suffix.lower() == ".jsonl":
        return _parse_json_lines(text, path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        return _parse_json_lines(text, path)
    return rows if isinstance(rows, list) else [rows]


def _parse_json_lines(text: str, path: Path) -> list[Any]:
    rows = []
    # Not splitlines: JSON strings may hold other line separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BitpressError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def _load_folder(path: Path) -> Any:
    import datasets  # noqa: PLC0415

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:
        raise BitpressError(
            f"the folder {path} was not written by save_to_disk: {error}; name one file in it, "
            "or load it with datasets.load_dataset and pass the result"
        ) from error


def _load_from_hub(name: str, splits: Splits, config: str | None) -> Any:
    import datasets  # noqa: PLC0415

    known = KNOWN.get(name, Known(name))
    place = (known.hub, *(each for each in [config or known.config] if each is not None))
    splits = splits or known.split
    try:
        if splits is None:
            return known.with_texts(select_split(datasets.load_dataset(*place), None, f"the dataset {name!r}"))
        parts = [datasets.load_dataset(*place, split=spec) for spec in _split_names(splits)]
        return known.with_texts(parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts))
    except BitpressError:
        raise
    except Exception as error:
        raise BitpressError(
            f"{name[:100]!r} is neither a path that exists nor a dataset that datasets.load_dataset can load: {error}; "
            "check the name (and dataset_config_name), or load it yourself and pass the result"
        ) from error


def _split_names(splits: Splits) -> list[str]:
    if isinstance(splits, Mapping):
        if "calibration" not in splits and len(splits) != 1:
            raise BitpressError(f'splits={splits!r}: a dict needs an entry "calibration"')
        splits = splits.get("calibration") or next(iter(splits.values()))
    names = [splits] if isinstance(splits, str) else list(splits or ())
    if not names:
        raise BitpressError(f'splits={splits!r}: must name splits, as in "train[:10%]"')
    return names


def _parts(parts: Mapping[str, Any], spec: str, where: str) -> list[Any]:
    import datasets  # noqa: PLC0415

    if spec in parts:
        return [parts[spec]]
    if any(isinstance(part, datasets.IterableDataset) for part in parts.values()):
        raise BitpressError(f"{where} is streamed and has the splits {', '.join(parts)}; {spec!r} is none of them")
    try:
        lengths = {name: len(part) for name, part in parts.items()}
        ranges = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (ValueError, AssertionError, TypeError) as error:
        raise BitpressError(f"splits={spec!r}: {where} has the splits {', '.join(parts)} ({error})") from error
    return [parts[each.splitname].select(range(each.from_, each.to)) for each in ranges]
