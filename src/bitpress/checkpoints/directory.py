"""A directory that appears whole or not at all."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitpress.errors import BitpressError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"
# Where the card goes if there is a README.md that is somebody else's, and by what ours is known.
SECOND_CARD = "README.bitpress.md"
CARD_MARK = "<!-- bitpress writes this file anew with the model. To keep changes of yours, remove this line. -->"
logger = logging.getLogger(__name__)

# Files by which a directory is known to hold a model.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf", "config.json")
# Left free on the disk, for what others write meanwhile.
SPARE_BYTES = 16 << 20


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint's directory.

    Raises:
        BitpressError: there is none, or it cannot be read.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise BitpressError(f"{path} holds no checkpoint: {CONFIG_FILE} is missing.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BitpressError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BitpressError(f"{file} is no JSON object: copy or download it again.")
    return config


def check_destination(directory: str | os.PathLike[str], *, overwrite: bool, needed: int = 0) -> Path:
    """Refuse a directory that holds a model already, a file, or a disk without room.

    Args:
        directory: where a checkpoint is to be written.
        overwrite: a model that is there may be replaced.
        needed: bytes that will be written.

    Raises:
        BitpressError: says which, and the way out.
    """
    path = Path(directory).expanduser().resolve()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir():
        raise BitpressError(f"{existing} is a file: give a directory.")
    if not overwrite and path.is_dir() and (found := _model_file(path)):
        raise BitpressError(f"{path} holds a model already ({found}): give another directory, or overwrite=True.")
    free = shutil.disk_usage(existing).free
    if needed + SPARE_BYTES > free:
        raise BitpressError(
            f"no room on the disk: {path} needs about {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free."
        )
    return path


def _model_file(path: Path) -> str | None:
    return next((p.name for pattern in MODEL_FILES for p in path.glob(pattern)), None)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A new directory beside ``path`` to write to, which takes its name once the ``with`` ends without an error.

    What else was in ``path`` (not a model's files) is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield draft
        take_place(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def draft_of(path: Path) -> Path:
    """The draft of a run that can go on after an interrupt: always the same."""
    return path.with_name(f".{path.name}.partial")


def take_place(draft: Path, path: Path) -> None:
    """Give a draft its name, once all of it is on the disk. What else was in ``path`` (no model's files) is kept."""
    _sync(draft)
    if path.is_dir():
        _replace(path, draft)
    else:
        draft.chmod(0o777 & ~_umask())
        draft.rename(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Return when the names of a directory's files are on the disk."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_own_card(file: Path) -> bool:
    """True for a README.md that bitpress has written, and nobody has claimed."""
    return CARD_MARK in file.read_text(encoding="utf-8", errors="replace")


def _spare_card(path: Path, draft: Path) -> None:
    """Leave a README.md of the user's where it is: the card goes beside it."""
    theirs, ours = path / CARD_FILE, draft / CARD_FILE
    if theirs.is_file() and ours.is_file() and is_own_card(ours) and not is_own_card(theirs):
        ours.replace(draft / SECOND_CARD)
        logger.warning("%s stays as it is: the model card is %s, beside it.", theirs, SECOND_CARD)


def _replace(path: Path, draft: Path) -> None:
    _spare_card(path, draft)
    replaced = {p for pattern in MODEL_FILES for p in path.glob(pattern)}
    for other in path.iterdir():
        if other not in replaced and not (draft / other.name).exists():
            copy = shutil.copytree if other.is_dir() else shutil.copy2
            copy(other, draft / other.name)
    draft.chmod(path.stat().st_mode & 0o777)
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        path.rename(old / path.name)
        draft.rename(path)
    except BaseException:
        if not path.exists():
            (old / path.name).rename(path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    sync_directory(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
