"""Finished rollouts, one JSON line each, written as they end: what a stopped evaluation goes on from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from experiments.robot.libero.results import EpisodeRecord

_PATTERN = "episodes.rank*.jsonl"


class Journal:
    """The rollouts of one process. A line is on the disk before `append` returns.

    Args:
        folder: of the evaluation.
        rank: each process of a sharded evaluation writes a file of its own.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path = folder / _PATTERN.replace("*", str(rank))

    def append(self, record: EpisodeRecord) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # A process that was killed while it wrote left half a line: it must not spoil this one.
            if file.tell() and self._last_byte() != b"\n":
                file.write(b"\n")
            file.write(json.dumps(asdict(record)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _last_byte(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1)


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


def has_journal(folder: Path) -> bool:
    """Whether an evaluation has left finished rollouts in a folder."""
    return any(folder.glob(_PATTERN))
