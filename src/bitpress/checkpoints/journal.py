"""What of a run is on the disk, so that one that was killed goes on from there.

The draft directory of a run has a fixed name, and stays where the run ends before its time. Its journal has one line
for what the run is and one for each block that is done, written after the block's bytes are safe. A line is a checksum
and JSON: one that was torn by a kill, or damaged since, is left out, and its block is done again. What a block's bytes
are does not depend on where a run was interrupted, so no other block needs to be.
"""

import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitpress.checkpoints.directory import draft_of, sync_directory, take_place
from bitpress.checkpoints.layout import ShardWriter
from bitpress.errors import BitpressError

logger = logging.getLogger(__name__)

JOURNAL = ".bitpress.journal"
LOCK = ".bitpress.lock"
CHECKSUMS = "checksums"
_FACTS = "facts"
_BLOCK = "block"
_ENTRY = "entry"
# Of a fact that differs, this much is shown.
_SHOWN = 60


@contextmanager
def resumable_directory(
    path: Path, facts: Mapping[str, Any], *, resume: bool = True
) -> Iterator[tuple[Path, "Journal"]]:
    """A draft directory beside ``path``, which takes its name once the ``with`` ends without an error, and its journal.

    After an error, an interrupt or a kill the draft is still there, if any block was done; the same run finds it.

    Args:
        path: where the checkpoint is to be; what else is there (not a model's files) is kept.
        facts: see :meth:`Journal.open`.
        resume: see :meth:`Journal.open`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    draft.mkdir(exist_ok=True)
    journal = Journal.open(draft, facts, resume=resume)
    try:
        yield draft, journal
        take_place(draft, path)
        for name in (JOURNAL, LOCK):
            (path / name).unlink(missing_ok=True)
    except BaseException:
        if not journal.entries:
            shutil.rmtree(draft, ignore_errors=True)
        elif draft.is_dir():
            logger.warning(
                "what is done is kept in %s: the same call goes on from there. Remove it if none will.", draft
            )
        raise
    finally:
        journal.close()


class Journal:
    """What of a run is on the disk.

    Attributes:
        entries: what was recorded, by block.
    """

    def __init__(self, file: Path, lock: int | None) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._file = file
        self._lock = lock
        self._descriptor = -1

    @classmethod
    def open(cls, draft: Path, facts: Mapping[str, Any], *, resume: bool = True) -> "Journal":
        """The journal of a draft directory; a new one where there is none.

        Args:
            draft: the directory, which must exist; no other process may use it until :meth:`close`.
            facts: all that decides what the bytes will be, as JSON can hold it, by names that mean something to the
                user: files of the model, hash of the data, recipe, seed, versions.
            resume: False clears the directory, whatever it holds.

        Raises:
            BitpressError: another process works there, the draft is of another run (the fact that differs is named),
                or its journal is damaged at the start.
        """
        lock = _lock(draft)
        journal = cls(draft / JOURNAL, lock)
        try:
            if not resume:
                _clear(draft)
            stated = json.loads(json.dumps(facts))
            first, end = journal._read(stated)
            journal._descriptor = os.open(journal._file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            os.ftruncate(journal._descriptor, end)
            if first:
                journal._append({_FACTS: stated})
                sync_directory(draft)
        except BaseException:
            journal.close()
            raise
        return journal

    def record(self, block: str, entry: Mapping[str, Any]) -> None:
        """Note that a block is done: its bytes must be on the disk (:meth:`ShardWriter.sync`).

        Args:
            block: its name; a later entry of the same name counts.
            entry: as JSON can hold it; under "checksums" those that :meth:`ShardWriter.write` gave, by tensor.
        """
        self._append({_BLOCK: block, _ENTRY: entry})
        self.entries[block] = json.loads(json.dumps(entry))

    def verify(self, writer: ShardWriter) -> dict[str, dict[str, Any]]:
        """Read what the journal says is there; entries with a tensor that has other bytes are dropped, with a warning.

        Returns:
            The entries that are left.
        """
        for block, entry in list(self.entries.items()):
            damaged = [
                name
                for name, checksum in entry.get(CHECKSUMS, {}).items()
                if name not in writer.layout.places or not writer.verify(name, checksum)
            ]
            if damaged:
                logger.warning(
                    "%s is damaged in %s and is done again. If it happens again, look after the disk.",
                    damaged[0],
                    writer.directory,
                )
                del self.entries[block]
        return self.entries

    def close(self) -> None:
        """Let other processes have the directory."""
        for descriptor in (self._descriptor, self._lock):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._descriptor, self._lock = -1, None

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line).encode()
        whole = b"%08x %s\n" % (zlib.crc32(text), text)
        try:
            if os.write(self._descriptor, whole) < len(whole):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            raise BitpressError(f"{self._file} cannot be written to: {error.strerror or error}.") from error

    def _read(self, facts: dict[str, Any]) -> tuple[bool, int]:
        """Fill ``entries``. True if the journal is still to be begun; and the bytes of it that stay."""
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return True, 0
        except OSError as error:
            raise BitpressError(f"{self._file} cannot be read: {error.strerror or error}.") from error
        end = content.rfind(b"\n") + 1
        first, *lines = [_parsed(line) for line in content[:end].split(b"\n")[:-1]] or [None]
        if end == 0:
            return True, 0
        if first is None or _FACTS not in first:
            raise BitpressError(f"{self._file} is damaged: start over with resume=False, or use another output_dir.")
        _check_same(first[_FACTS], facts, self._file.parent)
        for line in lines:
            if line is None or _BLOCK not in line:
                logger.warning(
                    "a line of %s is damaged: its block is done again, and nothing else is lost.", self._file
                )
            else:
                self.entries[line[_BLOCK]] = line[_ENTRY]
        return False, end


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What a line says, or None if it is not what was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], draft: Path) -> None:
    was, now = _flat(old), _flat(new)
    for fact in [*now, *(was.keys() - now.keys())]:
        if was.get(fact) != now.get(fact):
            raise BitpressError(
                f"{draft} holds what another run has left: its {fact} was {_shown(was.get(fact))}, and is "
                f"{_shown(now.get(fact))} now. Start over with resume=False, or use another output_dir."
            )


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts within facts, by their names joined."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} of {inner}": v for inner, v in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _shown(value: Any) -> str:
    text = "not stated" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _lock(draft: Path) -> int | None:
    """A lock of the directory, which a kill releases; None where the file system has none."""
    try:
        import fcntl  # noqa: PLC0415
    except ImportError:
        return None
    descriptor = os.open(draft / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other process may just have finished, and the file be gone.
        held = (draft / LOCK).stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        held = False
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning("%s cannot be locked (%s): see to it that no other process uses it.", draft, error.strerror)
            os.close(descriptor)
            return None
        held = False
    if not held:
        by = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise BitpressError(f"another process{f' ({by})' if by else ''} is writing to {draft}: wait for it, or end it.")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _clear(draft: Path) -> None:
    for path in draft.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
