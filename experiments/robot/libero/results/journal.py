"""Finished rollouts, one JSON line each, written as they end: what a stopped evaluation goes on from.

The first line, and another one each time it is gone on with, says of which evaluation they are: all that `results.json`
says but the episodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.robot.libero.results.results import FILE_NAME, SCHEMA_VERSION, EpisodeRecord, Results

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
        if self.path.exists() and not _has_rollouts(self.path):
            self.path.unlink()
            if self._made_folder:
                with contextlib.suppress(OSError):  # something else is in it
                    self.path.parent.rmdir()
        self._file.close()

    def begin(self, results: Results) -> None:
        """Say of which evaluation the following rollouts are; what ended before its first rollout is forgotten."""
        if not _has_rollouts(self.path):
            self._file.truncate(0)
        content = asdict(results)
        del content["episodes"]
        self._write_line({"schema_version": SCHEMA_VERSION, **content})

    def append(self, record: EpisodeRecord) -> None:
        """Raises OSError where the disk is full, say; the journal then holds the earlier rollouts."""
        self._write_line(asdict(record))

    def _write_line(self, content: dict[str, Any]) -> None:
        line = json.dumps(content, default=str).encode() + b"\n"
        # A process that was killed while it wrote left half a line: it must not spoil this one.
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                line = b"\n" + line
        left = memoryview(line)
        while left:
            left = left[self._file.write(left) or 0 :]
        os.fsync(self._file.fileno())


def _open_locked(path: Path) -> io.FileIO:
    """Open for appending, as the only process that does; unbuffered, so that an error leaves nothing to be written."""
    file = io.FileIO(path, "a+")
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
        for number, content in _lines(path):
            if _is_header(content):
                continue
            record = EpisodeRecord.from_json(content, f"{path}, line {number}")
            if record.invalid is None or record.key not in found:
                found[record.key] = record
    return list(found.values())


def read_header(folder: Path) -> Results | None:
    """What the journals say of their evaluation, without its episodes: as it was gone on with last, by the first one.

    None where they do not say it, as journals of before they did.
    """
    for path in sorted(folder.glob(_PATTERN)):
        for _, content in reversed(list(_lines(path))):
            if not _is_header(content):
                continue
            parts = [content.get(name) for name in ("run", "config", "policy", "versions")]
            if all(isinstance(part, dict) for part in parts):
                return Results(*parts)
    return None


def read_evaluation(folder: Path) -> Results | None:
    """All that a folder holds of an evaluation, by its results file and its journals; None where there is nothing.

    A damaged or missing results file costs nothing where the journals say of which evaluation they are. Of an
    evaluation with several processes that was stopped, the results have the first one's rollouts, the journals all.

    Raises:
        FileNotFoundError: for rollouts that nothing says the origin of.
        ValueError: as `Results.load` and `read_journals`.
    """
    results = header = read_header(folder)
    try:
        results = Results.load(folder)
    except FileNotFoundError:
        if header is None and has_rollouts(folder):
            raise
    except ValueError:
        if header is None:
            raise
    if results is None:
        return None
    if results.run.get("complete") is False:  # else the results file is the last word
        found = {record.key: record for record in results.episodes}
        found |= {
            record.key: record for record in read_journals(folder) if record.invalid is None or record.key not in found
        }
        results.episodes = sorted(found.values(), key=lambda record: record.key)
    return results


def load_results(path: str | Path) -> Results:
    """A results file, or all that the folder holds in which it lies (`read_evaluation`) where it is not complete.

    Raises:
        FileNotFoundError, ValueError: as `Results.load` and `read_journals`.
    """
    path = Path(path)
    if not path.is_dir() and path.name != FILE_NAME:
        return Results.load(path)
    folder = path if path.is_dir() else path.parent
    found = read_evaluation(folder) if folder.is_dir() else None
    return Results.load(path) if found is None else found


def has_rollouts(folder: Path) -> bool:
    """Whether an evaluation has left finished rollouts in the journals of a folder."""
    return any(_has_rollouts(path) for path in folder.glob(_PATTERN))


def _has_rollouts(path: Path) -> bool:
    return any(not _is_header(content) for _, content in _lines(path))


def _is_header(content: Any) -> bool:
    return isinstance(content, dict) and "schema_version" in content


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Whole lines by number, from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line)
            except ValueError:
                continue
