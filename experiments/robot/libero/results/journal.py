"""Finished rollouts, one JSON line each, written as they end: what a stopped evaluation goes on from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from experiments.robot.libero.results.results import FILE_NAME, EpisodeRecord, Results

logger = logging.getLogger(__name__)

_PATTERN = "episodes.rank*.jsonl"


class JournalInUse(ValueError):
    """Another process writes into the same folder: both would do the same rollouts."""


class Journal:
    """The rollouts of one process; use it as a context manager. A line is on the disk before `append` returns.

    Args:
        folder: of the evaluation; made where it is missing.
        rank: each process of a sharded evaluation writes a file of its own.
        world_size: how many processes there are. The first one also looks whether an evaluation with more processes is
            still writing.

    Raises:
        JournalInUse: while another process has the journal open, where the file system knows locks.
        OSError: when the folder cannot be made or written.
    """

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        self.path = folder / _PATTERN.replace("*", str(rank))
        self._made_folder = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(self.path)
        try:
            siblings = {_PATTERN.replace("*", str(number)) for number in range(world_size)}
            for other in sorted(folder.glob(_PATTERN)) if rank == 0 else ():
                if other.name not in siblings:
                    _open_locked(other).close()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End writing. A journal without rollouts leaves no trace; may be called twice."""
        if self._file.closed:
            return
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()
            if self._made_folder:
                with contextlib.suppress(OSError):  # something else is in it
                    self.path.parent.rmdir()
        self._file.close()

    def append(self, record: EpisodeRecord) -> None:
        # A process that was killed while it wrote left half a line: it must not spoil this one.
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
        self._file.write(json.dumps(asdict(record)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _open_locked(path: Path) -> BinaryIO:
    """Open for appending, as the only process that does."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise JournalInUse(
            f"--output_dir {path.parent}: another evaluation is writing {path.name} there; wait for its end, or choose "
            "another folder"
        ) from error
    except OSError:
        logger.info("%s cannot be locked here: let no second evaluation write into %s", path.name, path.parent)
    return file


def read_journals(folder: Path) -> list[EpisodeRecord]:
    """The rollouts of all processes of an earlier run; for a start that was repeated, the valid one.

    Lines that were cut off are left out: their rollouts are done again.

    Raises:
        ValueError: when a whole line has unknown keys, as another version of this code writes.
    """
    found: dict[tuple[str, int, int, int], EpisodeRecord] = {}
    for path in sorted(folder.glob(_PATTERN)):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                content = json.loads(line)
            except ValueError:
                continue
            record = EpisodeRecord.from_json(content, f"{path}, line {number}")
            if record.invalid is None or record.key not in found:
                found[record.key] = record
    return list(found.values())


def load_results(path: str | Path) -> Results:
    """A results file, or the one inside a folder; with all that the journals beside it hold where it is not complete.

    The results of an evaluation with several processes that was stopped have the first one's rollouts alone.

    Raises:
        FileNotFoundError, ValueError: as `Results.load` and `read_journals`.
    """
    results, path = Results.load(path), Path(path)
    if results.run.get("complete") is False and (path.is_dir() or path.name == FILE_NAME):
        found = {record.key: record for record in results.episodes}
        found |= {record.key: record for record in read_journals(path if path.is_dir() else path.parent)}
        results.episodes = sorted(found.values(), key=lambda record: record.key)
    return results


def has_journal(folder: Path) -> bool:
    """Whether an evaluation has left finished rollouts in a folder."""
    return any(path.stat().st_size for path in folder.glob(_PATTERN))
