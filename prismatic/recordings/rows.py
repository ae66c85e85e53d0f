"""An episode while it goes on: a file per observation, so that memory stays small and a crash loses nothing.

The folder lies beside the record that it becomes, with a dot before its name. Of what a killed process left there
`finish_leftovers` makes a record.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from prismatic.atomic_files import replacing
from prismatic.recordings.archive import IMAGES
from prismatic.recordings.recording import write_recording

try:
    import fcntl
except ImportError:  # Windows: what a killed process left is then left to its owner
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_PREFIX, _SUFFIX = ".", ".unfinished"
_YOUNG_S = 60.0
UNFINISHABLE = (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
"""What `RowFolder.finish` raises over a full disk, or rows that are damaged or no longer there."""
_OPTIONAL = ("chunk", "kept", "picks", "scores", "executed")


@dataclass(frozen=True, eq=False)
class Row:
    """One observation.

    Attributes:
        images: camera -> (H, W, 3) uint8.
        state: (P,).
        time: when it came, in seconds since 1970.
        number: of the policy query or control step in its episode.
        executed: (n, action_dim) the actions executed since the row before; None where nobody said.
        chunk, kept, picks, scores, warnings: of the answer, as in `Recording`; None, or empty, where there was none.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float64]
    time: float
    number: int
    executed: NDArray[np.float64] | None = None
    chunk: NDArray[np.float64] | None = None
    kept: NDArray[np.bool_] | None = None
    picks: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None
    warnings: tuple[str, ...] = ()

    def fits(self, other: Row) -> bool:
        """Whether both can stand in one record: equal cameras, sizes, and kinds of what was answered."""
        return self._layout == other._layout

    @property
    def _layout(self) -> tuple[Any, ...]:
        sizes = {camera: picture.shape for camera, picture in self.images.items()}
        answered = (self.chunk, self.kept, self.picks, self.scores)
        return sizes, self.state.shape, *(None if part is None else part.shape for part in answered)


@dataclass
class RowFolder:
    """The rows of one episode on the disk.

    Attributes:
        path: of the record that it becomes.
        header: entries of `Recording` that are no arrays.
        count: rows so far.
        last: the latest row; None before there is one.
    """

    path: Path
    header: dict[str, Any]
    count: int = 0
    last: Row | None = field(default=None, repr=False)
    _lock: IO[str] | None = field(default=None, repr=False)

    @classmethod
    def begin(cls, path: Path, header: Mapping[str, Any]) -> RowFolder:
        """Make the folder, for rows to come."""
        rows = cls(path, dict(header))
        rows.folder.mkdir(parents=True)
        try:
            (rows.folder / "header.json").write_text(json.dumps(rows.header, default=str), encoding="utf-8")
            rows.lock()
        except OSError:
            rows.discard()
            raise
        return rows

    def lock(self) -> bool:
        """Say that a process is writing here, until the rows are finished or it dies; False if one says so already."""
        if fcntl is None:
            return False
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.unlock()
            return False
        return True

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def folder(self) -> Path:
        """Where the rows are."""
        return self.path.with_name(f"{_PREFIX}{self.path.stem}{_SUFFIX}")

    def append(self, row: Row) -> None:
        """Write one row: whole, or not there if the process dies meanwhile."""
        arrays: dict[str, Any] = {name: value for name in _OPTIONAL if (value := getattr(row, name)) is not None}
        arrays |= {IMAGES + camera: picture for camera, picture in row.images.items()}
        facts = json.dumps({"time": row.time, "number": row.number, "warnings": row.warnings})
        file = self._file(self.count)
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:  # not synced: a power cut loses the episode that goes on, no finished one
            np.savez(stream, state=row.state, facts=np.array(facts), **arrays)
        os.replace(partial, file)
        self.count += 1
        self.last = row

    def finish(self, tail: NDArray[np.float64] | None = None, success: bool | None = None) -> Path:
        """Make the record, one row in memory at a time, and remove the rows.

        Args:
            tail: the actions executed since the last row, where they are known.
            success: whether the episode reached its goal, where that is known.
        """
        rows = [self._row(number, pictures=False) for number in range(self.count)]
        arrays: dict[str, NDArray[Any]] = {
            "states": np.stack([row.state for row in rows]).astype(np.float64),
            "times": np.array([row.time for row in rows]),
            "numbers": np.array([row.number for row in rows]),
        }
        for name, plural in (("chunk", "chunks"), ("kept", "kept"), ("picks", "picks"), ("scores", "scores")):
            values = [getattr(row, name) for row in rows]
            if all(value is not None for value in values):
                arrays[plural] = np.stack(values)
        arrays |= _executed(rows, tail)
        header = {**self.header, "success": success, "warnings": [list(row.warnings) for row in rows]}
        first = self._row(0)
        pictures = {c: ((self.count, *p.shape), self._pictures(c)) for c, p in first.images.items()}
        with replacing(self.path) as partial, partial.open("wb") as file:
            write_recording(file, header, arrays, pictures)
        self.discard()
        return self.path

    def discard(self) -> None:
        """Remove the rows, and make no record of them."""
        self.unlock()
        shutil.rmtree(self.folder)

    def _pictures(self, camera: str) -> Iterator[NDArray[np.uint8]]:
        for number in range(self.count):
            with np.load(self._file(number), allow_pickle=False) as content:
                yield content[IMAGES + camera]

    def _row(self, number: int, pictures: bool = True) -> Row:
        with np.load(self._file(number), allow_pickle=False) as content:
            facts = json.loads(str(content["facts"]))
            cameras = [name for name in content.files if name.startswith(IMAGES)] if pictures else []
            optional = {name: content[name] for name in _OPTIONAL if name in content}
            images = {name.removeprefix(IMAGES): content[name] for name in cameras}
            facts["warnings"] = tuple(facts["warnings"])
            return Row(images, content["state"], **facts, **optional)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"


def _executed(rows: list[Row], tail: NDArray[np.float64] | None) -> dict[str, NDArray[Any]]:
    """`actions` and `steps`, where every row but the first says what was executed before it and none was missed."""
    between = [row.executed for row in rows[1:]]
    known = [actions for actions in between if actions is not None]
    gaps = any(later.number != row.number + 1 for row, later in zip(rows[:-1], rows[1:], strict=True))
    if len(known) < len(between) or gaps or not (known or tail is not None):
        return {}
    counts = np.cumsum([0, *map(len, known)])
    return {"actions": np.concatenate([*known, *([] if tail is None else [tail])]), "steps": counts}


def finish_leftovers(folder: Path) -> list[Path]:
    """Make records of what killed processes left in a folder; what is no episode stays where it is, and is logged."""
    finished = []
    for left in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
        path = folder / f"{left.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)}.npz"
        rows = RowFolder(path, {}, len(list(left.glob("*.npz"))))
        if not rows.lock():
            continue  # it goes on
        try:
            if not rows.count:  # a young one may be about to begin
                if time.time() - left.stat().st_mtime > _YOUNG_S:
                    rows.discard()
                continue
            rows.header = json.loads((left / "header.json").read_text(encoding="utf-8"))
            finished.append(rows.finish())
        except UNFINISHABLE as error:
            logger.warning("%s is left as it is, no record can be made of it: %s", left, error)
            continue
        finally:
            rows.unlock()
        logger.info("finished %s, which was cut off", path)
    return finished
