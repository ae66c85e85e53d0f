"""Which files a dataset is made of, and their bytes."""

import mmap
import re
from pathlib import Path

from prismatic.vla.datasets.tfrecord import LFS_POINTER

_SHARD_NAME = re.compile(r"-(?P<split>[^-.]+)\.tfrecord(-(?P<number>\d+)-of-(?P<count>\d+))?$")
_VERSION_NAME = re.compile(r"^\d+\.\d+\.\d+$")


MAX_OPEN_SHARDS = 256
MAPPED_BYTES = 256 << 20
"""Of shards that a process has read through its maps; then it lets go of those pages, which stay in the file cache.

Else a worker that has gone through a dataset seems to take as much memory as the dataset has bytes.
"""
_PER_READ = 64 << 10  # so many bytes at least are mapped around what is read


class ShardFiles:
    """Memory-mapped shards, opened on first use in each process; pickles as the list of paths.

    At most `MAX_OPEN_SHARDS` stay open: each takes a file descriptor, of which a process may have 1024.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._maps: dict[int, mmap.mmap] = {}
        self._mapped = 0

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "_maps": {}, "_mapped": 0}

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """A part of a shard, copied."""
        found = self.bytes_of(shard)[start:stop]
        self._mapped += max(len(found), _PER_READ)
        if self._mapped > MAPPED_BYTES:
            self.let_go()
        return found

    def let_go(self) -> None:
        """Unmap the pages that were read; the next read maps what it needs again."""
        self._mapped = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            for opened in self._maps.values():
                opened.madvise(mmap.MADV_DONTNEED)

    def bytes_of(self, shard: int) -> mmap.mmap:
        """The whole shard as a buffer. Raises ValueError if the file is empty."""
        if shard not in self._maps:
            path = self.paths[shard]
            if path.stat().st_size == 0:
                raise ValueError(f"shard {path} is cut off at byte 0: the file is empty. Copy or write it again")
            if len(self._maps) >= MAX_OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]  # whoever still reads it keeps it open
            with path.open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]


def find_version(root: Path, name: str) -> Path:
    """The folder of a dataset's newest version.

    Raises:
        FileNotFoundError: naming what is there instead.
        ValueError: where shards lie beside the version's folder.
    """
    root = root.expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"the data folder {root} does not exist; data_root_dir must hold one folder per dataset"
        )
    folder = root / name
    if not folder.is_dir():
        present = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        raise FileNotFoundError(
            f"there is no dataset folder {folder}; {root} holds {', '.join(present) or 'no folders'}. Download the "
            "dataset there, collect it, or correct dataset_name"
        )
    found = versions(folder)
    if found and any(_SHARD_NAME.search(path.name) for path in folder.iterdir()):
        raise ValueError(
            f"{folder} holds shards and a version's folder ({found[-1].name}); move those elsewhere that are not meant"
        )
    return found[-1] if found else folder


def versions(folder: Path) -> list[Path]:
    """Folders of a dataset's versions, the newest last."""
    found = [path for path in folder.iterdir() if path.is_dir() and _VERSION_NAME.match(path.name)]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def find_shards(directory: Path) -> list[Path]:
    """All shards of all splits, sorted.

    Raises:
        FileNotFoundError: if there are none, or one of a numbered set lacks.
        ValueError: if a split has two sets of shards, splits are of different datasets, or a shard is only git-lfs's
            placeholder.
    """
    paths = sorted(path for path in directory.iterdir() if _SHARD_NAME.search(path.name))
    if not paths:
        present = sorted(path.name for path in directory.iterdir())
        raise FileNotFoundError(
            f"dataset folder {directory} has no shards (*.tfrecord*); it holds {', '.join(present) or 'nothing'}. "
            "Download or collect the dataset again"
        )
    first_of: dict[str, Path] = {}
    for path in paths:
        match = _match(path)
        stem = path.name[: match.start("number") if match["count"] else None]
        first = first_of.setdefault(match["split"], path)
        if path.name != first.name and (match["count"] is None or _set_of(first) != _set_of(path)):
            raise ValueError(
                f"{directory} holds two sets of shards of the split {match['split']!r}: {first.name} and {path.name} "
                "do not belong together. Move the files of one of them elsewhere"
            )
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(
                    f"shard {path} is a placeholder that git-lfs left; run `git lfs pull` there, or download it again"
                )
        for number in range(int(match["count"] or 0)):
            sibling = path.with_name(f"{stem}{number:0{len(match['number'])}d}-of-{match['count']}")
            if not sibling.exists():
                raise FileNotFoundError(f"shard {sibling} is missing beside {path.name}: the copy is incomplete")
    if len(names := sorted({path.name[: _match(path).start()] for path in paths})) > 1:
        raise ValueError(
            f"{directory} holds shards of several datasets ({', '.join(names)}); move all but one's elsewhere, or give "
            "them one name if they belong together"
        )
    return paths


def split_of(path: Path) -> str:
    """The split that a shard belongs to: `train`, `val`, ..."""
    return _match(path)["split"]


def _match(path: Path) -> re.Match[str]:
    match = _SHARD_NAME.search(path.name)
    assert match is not None
    return match


def _set_of(path: Path) -> tuple[str, str | None]:
    """What the names of one set of shards have in common: all but the shard's number."""
    match = _match(path)
    return path.name[: match.start()], match["count"]
