"""What the `meta` folder of a LeRobot dataset says: features, episodes, sentences, and which file holds what.

Versions 2.0 and 2.1 have a Parquet file and a video per camera for each episode, 3.0 files of many episodes each.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prismatic.vla.datasets.lerobot.libraries import import_parquet
from prismatic.vla.datasets.lerobot.numbers import positive_number, seconds, whole_number

INFO = Path("meta") / "info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
_CHUNK = 1000  # episodes in a folder where v2 does not say it
_TASK_KEYS = ("task_index", "task")
_CONVERTER = "convert it with LeRobot's own converter (python -m lerobot.datasets.v30.convert_dataset_v21_to_v30)"


@dataclass(frozen=True)
class VideoPart:
    """Where the pictures of an episode are: from when on in which video, in seconds."""

    path: Path
    start: float


@dataclass(frozen=True)
class EpisodeEntry:
    """An episode as `meta` lists it.

    Attributes:
        number: `episode_index`.
        length: frames.
        table: the Parquet file of its values.
        videos: feature -> where its pictures are.
        listed_in: the file of `meta`.
    """

    number: int
    length: int
    table: Path
    videos: Mapping[str, VideoPart]
    listed_in: Path


@dataclass(frozen=True)
class Layout:
    """A LeRobot dataset without its frames.

    Attributes:
        folder: the dataset's.
        version: one of `VERSIONS`.
        info: `meta/info.json`.
    """

    folder: Path
    version: str
    info: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Layout":
        """Raises ValueError for a version that is not read, and for an `info.json` that is none."""
        path = folder / INFO
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}. Download the dataset again") from error
        version = info.get("codebase_version") if isinstance(info, dict) else None
        if version not in VERSIONS:
            raise ValueError(
                f"{folder} is a LeRobot dataset of version {version!r}, and {', '.join(VERSIONS)} are read: "
                f"{_CONVERTER}"
            )
        features = info.get("features")
        if not isinstance(features, dict) or not all(
            isinstance(feature, dict) and isinstance(feature.get("dtype"), str) for feature in features.values()
        ):
            raise ValueError(f"{path} lists no features with their dtype. Download the dataset again")
        needed = ("fps", "data_path", *(["video_path"] if "video" in {f["dtype"] for f in features.values()} else []))
        if missing := [key for key in needed if info.get(key) in (None, "")]:
            raise ValueError(f"{path} lacks {', '.join(missing)}. Download the dataset again")
        positive_number(info["fps"], f"{path}: fps")
        return cls(folder, version, info)

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Name -> dtype, shape and so on."""
        features: dict[str, dict[str, Any]] = self.info["features"]
        return features

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.info["fps"])

    @property
    def camera_features(self) -> tuple[str, ...]:
        """Features that are pictures."""
        return tuple(name for name, feature in self.features.items() if feature["dtype"] in ("video", "image"))

    def labels(self, feature: str) -> tuple[str, ...]:
        """The names of a feature's dimensions, which stand in a list or one level below; empty where there are none."""
        names = self.features.get(feature, {}).get("names")
        if isinstance(names, dict):
            names = next(iter(names.values()), None)
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def split_of(self, episode: int) -> str:
        """`train`, unless `splits` has the episode in another one, such as `val`: `120:140`."""
        splits = self.info.get("splits")
        for name, text in splits.items() if isinstance(splits, dict) else ():
            first, _, end = str(text).partition(":")
            if name != "train" and first.isdigit() and end.isdigit() and int(first) <= episode < int(end):
                return str(name)
        return "train"

    def episodes(self) -> list[EpisodeEntry]:
        """All episodes in their order.

        Raises ValueError where `meta` is incomplete, or its parts disagree about episodes and frames.
        """
        found = self._listed() if self.version == "v3.0" else self._one_file_each()
        found.sort(key=lambda entry: entry.number)
        for before, entry in pairwise(found):
            if before.number == entry.number:
                raise ValueError(
                    f"episode {entry.number} is listed twice, in {before.listed_in} and {entry.listed_in}: its steps "
                    "would count twice. Take one out, or download the dataset again"
                )
        frames = sum(entry.length for entry in found)
        for key, count in (("total_episodes", len(found)), ("total_frames", frames)):
            if self.info.get(key, count) != count:
                raise ValueError(
                    f"{self.folder / INFO} says {key} {self.info[key]!r}, and meta/episodes lists {count}: the copy is "
                    "incomplete. Download the dataset again"
                )
        if not found:
            raise ValueError(f"{self.folder} holds no episodes: download or record the dataset again")
        return found

    def sentences(self) -> dict[int, str]:
        """`task_index` -> instruction, stripped of blanks, empty for null. Raises ValueError where they are no such."""
        if self.version != "v3.0":
            path = self.folder / "meta" / "tasks.jsonl"
            return _sentences(path, ((row["task_index"], row["task"]) for row in _json_lines(path, _TASK_KEYS)))
        path = self.folder / "meta" / "tasks.parquet"
        columns = _read_parquet(path)
        texts = next((columns[name] for name in ("task", "__index_level_0__") if name in columns), None)
        if texts is None or "task_index" not in columns:
            raise ValueError(f"{path} has the columns {', '.join(columns)}; expected task_index and a task for each")
        return _sentences(path, zip(columns["task_index"], texts, strict=True))

    def _videos(self) -> list[str]:
        return [name for name, feature in self.features.items() if feature["dtype"] == "video"]

    def _one_file_each(self) -> list[EpisodeEntry]:
        path = self.folder / "meta" / "episodes.jsonl"
        chunk = whole_number(self.info.get("chunks_size", _CHUNK), f"{self.folder / INFO}: chunks_size", least=1)
        found = []
        for line, row in enumerate(_json_lines(path, ("episode_index", "length")), 1):
            number = whole_number(row["episode_index"], f"{path}, episode {line} in it: episode_index")
            length = whole_number(row["length"], f"{path}: length of episode {number}")
            place = {"episode_chunk": number // chunk, "episode_index": number}
            videos = {key: VideoPart(self._file("video_path", **place, video_key=key), 0.0) for key in self._videos()}
            found.append(EpisodeEntry(number, length, self._file("data_path", **place), videos, path))
        return found

    def _listed(self) -> list[EpisodeEntry]:
        paths = sorted((self.folder / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise ValueError(f"{self.folder / 'meta' / 'episodes'} holds no Parquet file. Download the dataset again")
        found = []
        for path in paths:
            columns = _read_parquet(path, without="stats/")
            keys = ["episode_index", "length", "data/chunk_index", "data/file_index"]
            parts = ("chunk_index", "file_index", "from_timestamp")
            keys += [f"videos/{key}/{part}" for key in self._videos() for part in parts]
            if missing := [key for key in keys if key not in columns]:
                raise ValueError(f"{path} lacks the columns {', '.join(missing)}. Download the dataset again")
            for values in zip(*(columns[key] for key in keys), strict=True):
                row = dict(zip(keys, values, strict=True))
                found.append(self._entry(row, path))
        return found

    def _entry(self, row: Mapping[str, Any], path: Path) -> EpisodeEntry:
        number = whole_number(row["episode_index"], f"{path}: episode_index")

        def said(key: str) -> str:
            return f"{path}: {key} of episode {number}"

        def place(prefix: str) -> dict[str, int]:
            keys = {part: f"{prefix}/{part}" for part in ("chunk_index", "file_index")}
            return {part: whole_number(row[key], said(key)) for part, key in keys.items()}

        def start(key: str) -> float:
            return seconds(row[key], said(key))

        videos = {
            key: VideoPart(
                self._file("video_path", video_key=key, **place(f"videos/{key}")),
                start(f"videos/{key}/from_timestamp"),
            )
            for key in self._videos()
        }
        table = self._file("data_path", **place("data"))
        return EpisodeEntry(number, whole_number(row["length"], said("length")), table, videos, path)

    def _file(self, pattern: str, **place: Any) -> Path:
        try:
            return self.folder / str(self.info[pattern]).format(**place)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{self.folder / INFO}: {pattern} {self.info[pattern]!r} cannot be filled in with {', '.join(place)} "
                f"({error!r})"
            ) from None


def is_lerobot(folder: Path) -> bool:
    """Whether a folder holds a LeRobot dataset, of any version."""
    return (folder / INFO).is_file()


def _sentences(path: Path, tasks: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    found = {}
    for index, text in tasks:
        # pandas writes a sentence that lacks as null or as NaN.
        lacks = text is None or text != text
        found[whole_number(index, f"{path}: task_index of {text!r}")] = "" if lacks else str(text).strip()
    return found


def _json_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download the dataset again") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise ValueError(f"line {number} of {path} lacks {' or '.join(keys)}. Download the dataset again")
    return rows


def _read_parquet(path: Path, without: str = "\0") -> dict[str, list[Any]]:
    """Columns by name, but for those whose name begins with `without`."""
    parquet = import_parquet()
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if not name.startswith(without)]
            columns: dict[str, list[Any]] = file.read(columns=names).to_pydict()
            return columns
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise ValueError(f"{path} cannot be read as Parquet: {error}. Download the dataset again") from error
