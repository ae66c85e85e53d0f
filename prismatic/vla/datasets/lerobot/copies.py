"""Pictures of Parquet files, copied once byte by byte into a flat file, since Parquet has no way to a single one.

Reading one picture of a row group unpacks all of them: for 200 frames of 256 pixels several times what decoding takes.
"""

import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.atomic_files import write_atomically
from prismatic.vla.datasets.lerobot.libraries import import_parquet

logger = logging.getLogger(__name__)

FOLDER = "lightvla_pictures"
_VERSION = 1  # of these files
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR)
_SPARE_BYTES = 1 << 28  # left free on the disk


class FlatPictures:
    """The pictures of one camera, one behind the other in a file; pickles as its path and the places."""

    def __init__(self, path: Path, ends: np.ndarray):
        """Args:
        path: the flat file.
        ends: (N + 1,) int64, where each of N pictures begins, and where the last one ends.
        """
        self.path = path
        self.ends = ends
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "ends": self.ends, "_map": None}

    def stored(self, frame: int) -> bytes:
        """The picture of a frame of the dataset as it is stored."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map[int(self.ends[frame]) : int(self.ends[frame + 1])]


@dataclass(frozen=True)
class _Source:
    """What is copied: a feature of a dataset's Parquet files, in their order."""

    feature: str
    tables: Sequence[Path]

    @property
    def stamp(self) -> dict[str, Any]:
        """By which a changed dataset is known."""
        stats = [path.stat() for path in self.tables]
        files = [[path.name, found.st_size, found.st_mtime_ns] for path, found in zip(self.tables, stats, strict=True)]
        return {"version": _VERSION, "feature": self.feature, "tables": files}

    def pictures(self) -> Iterator[bytes]:
        """In the order of rows. Raises ValueError for one that is not in the file."""
        for path in self.tables:
            row = 0
            try:
                with self._opened(path) as file:
                    for batch in file.iter_batches(batch_size=64, columns=[self.feature], use_threads=False):
                        for picture in batch.column(0).to_pylist():
                            yield self._bytes(picture, path, row)
                            row += 1
            except OSError as error:
                raise ValueError(f"{path} is damaged: {error}. Download it again") from error

    def _opened(self, path: Path) -> Any:
        try:
            file = import_parquet().ParquetFile(path, memory_map=True)
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            raise ValueError(f"{path} cannot be read as Parquet: {error}. Download the dataset again") from error
        if self.feature not in file.schema_arrow.names:
            raise ValueError(f"{path} lacks the column {self.feature}; it has {', '.join(file.schema_arrow.names)}")
        return file

    def _bytes(self, picture: Any, path: Path, row: int) -> bytes:
        found = picture.get("bytes") if isinstance(picture, dict) else None
        if not found:
            raise ValueError(
                f"{path} has no picture in {self.feature!r} at row {row}: it was written without embedding its files. "
                "Download or write the dataset again"
            )
        return bytes(found)


def flat_pictures(folder: Path, feature: str, tables: Sequence[Path]) -> FlatPictures:
    """The pictures of one feature, copied where that has not been done; several processes may ask at once.

    The copy lies in the dataset's folder, or in this user's cache where that cannot be written.

    Raises:
        ValueError: a file is damaged or holds no pictures.
        OSError: there is no room for the copy.
    """
    source = _Source(feature, tables)
    for place in _places(folder):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with _alone(place / f"{feature}.lock"):
                return _known(place, source) or _copied(place, source)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            reason = error
    raise OSError(f"{folder}: pictures in Parquet files are copied once, and neither there nor to the cache: {reason}")


def _places(folder: Path) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / FOLDER, home / "lightvla" / FOLDER / name]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While one process copies, others wait, and then find the copy."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _known(place: Path, source: _Source) -> FlatPictures | None:
    try:
        if json.loads((place / f"{source.feature}.json").read_text()) != source.stamp:
            return None
        ends = np.load(place / f"{source.feature}.npy")
    except (OSError, ValueError):
        return None
    path = place / f"{source.feature}.bin"
    return FlatPictures(path, ends) if path.is_file() and path.stat().st_size == ends[-1] else None


def _copied(place: Path, source: _Source) -> FlatPictures:
    path, stamp = place / f"{source.feature}.bin", source.stamp
    size = sum(table.stat().st_size for table in source.tables)
    if (free := shutil.disk_usage(place).free) < size + _SPARE_BYTES:
        raise OSError(
            f"pictures in Parquet files are copied once to be read one by one: {source.feature} takes up to "
            f"{size / 1e9:.1f} GB in {place}, where {free / 1e9:.1f} GB are free. Make room there"
        )
    logger.info("copying the pictures of %s once, up to %.1f GB, to %s", source.feature, size / 1e9, place)
    (place / f"{source.feature}.json").unlink(missing_ok=True)
    ends = [0]
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for picture in source.pictures():
            file.write(picture)
            ends.append(ends[-1] + len(picture))
    partial.replace(path)  # who still reads an old copy keeps it
    places = np.array(ends, np.int64)
    np.save(place / f"{source.feature}.npy", places)
    write_atomically(place / f"{source.feature}.json", json.dumps(stamp) + "\n")  # last: now it is whole
    return FlatPictures(path, places)
