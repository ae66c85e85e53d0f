"""RLDS shards as a frame index: one walk notes where every frame's JPEG lies in its memory-mapped shard.

Each record of a shard is one episode. States, actions and the instruction are small and kept in memory; images stay in
the file until a frame is asked for, so a global shuffle costs nothing.
"""

import logging
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import track

from prismatic.vla.datasets.catalog import DatasetSpec, get_dataset_spec
from prismatic.vla.datasets.tfrecord import Example, read_examples

logger = logging.getLogger(__name__)

_SHARD_NAME = re.compile(r"-(?P<split>[^-.]+)\.tfrecord(-(?P<number>\d+)-of-(?P<count>\d+))?$")
_VERSION_NAME = re.compile(r"^\d+\.\d+\.\d+$")
_PROGRESS_BAR_BYTES = 1 << 30  # smaller datasets are indexed within two seconds

MAX_OPEN_SHARDS = 256


class ShardFiles:
    """Memory-mapped shards, opened on first use in each process; pickles as the list of paths.

    At most `MAX_OPEN_SHARDS` stay open: each takes a file descriptor, of which a process may have 1024.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._maps: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "_maps": {}}

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


@dataclass(frozen=True)
class Episode:
    """One episode of T steps.

    Attributes:
        split: `train`, `val`, ... as in the shard's name.
        instruction: the sentence.
        state: (T, proprio_dim) float32, or None if the dataset has no state.
        action: (T, action_dim) float32 as stored, or as the catalogue's `map_episode` makes it; gripper not mapped.
        image_ranges: camera name -> (T, 2) int64, first byte and the byte after the last in the shard.
    """

    split: str
    instruction: str
    state: np.ndarray | None = field(repr=False)
    action: np.ndarray = field(repr=False)
    image_ranges: Mapping[str, np.ndarray] = field(repr=False)
    shard: int
    shards: ShardFiles = field(repr=False)

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.action)

    def image_bytes(self, camera: str, step: int) -> bytes:
        """The JPEG of one camera at one step."""
        start, stop = self.image_ranges[camera][step]
        return self.shards.bytes_of(self.shard)[start:stop]


@dataclass(frozen=True)
class RldsIndex:
    """All episodes of one dataset, `train` shards and others, in the order of shard names.

    Attributes:
        spec: how the dataset's features map to cameras, state and action.
        directory: the folder of the shards.
        episodes: the episodes.
        feature_names: every feature the first episode has, known to `spec` or not.
    """

    spec: DatasetSpec
    directory: Path
    episodes: list[Episode]
    feature_names: tuple[str, ...]

    @classmethod
    def open(cls, root: Path | str, name: str, spec: DatasetSpec | None = None) -> "RldsIndex":
        """Index `<root>/<name>/<version>/*.tfrecord*` (the newest version).

        Args:
            root: folder of datasets.
            name: the dataset's folder.
            spec: how to read it; the catalogue's entry by default.

        Raises:
            ValueError: the dataset is unknown, a shard is cut off or damaged (names shard and byte), or its features
                do not fit the robot.
            FileNotFoundError: there is no such folder, or shards are missing.
        """
        spec = spec or get_dataset_spec(name)
        directory = find_version(Path(root), name)
        shards = ShardFiles(find_shards(directory))
        total = sum(path.stat().st_size for path in shards.paths)
        numbers = range(len(shards.paths))
        episodes: list[Episode] = []
        unlabelled = 0
        feature_names: tuple[str, ...] = ()
        quiet = total < _PROGRESS_BAR_BYTES
        for number in track(numbers, description=f"indexing {name}", transient=True, disable=quiet):
            for example in read_examples(shards.bytes_of(number), shards.paths[number]):
                feature_names = feature_names or tuple(sorted(example.features))
                episode = _episode(example, spec, shards, number)
                if episode.instruction.strip():
                    episodes.append(episode)
                else:
                    unlabelled += 1
        if unlabelled:
            logger.warning("%s: %d episodes without an instruction are left out", name, unlabelled)
        if not episodes:
            raise ValueError(f"the shards of {directory} hold no episodes: collect or download the dataset again")
        logger.info("%s: %d episodes, %.2f GB in %d shards", name, len(episodes), total / 1e9, len(shards.paths))
        return cls(spec, directory, episodes, feature_names)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.spec.name

    def numbers_of(self, split: str) -> list[int]:
        """Numbers of the episodes that a split holds."""
        return [number for number, episode in enumerate(self.episodes) if episode.split == split]

    def check_cameras(self, num_images: int) -> tuple[str, ...]:
        """The first `num_images` camera names. Raises ValueError if the robot, catalogue or data has fewer."""
        keys = self.spec.camera_keys(num_images)
        for camera, key in keys.items():
            if any(camera not in episode.image_ranges for episode in self.episodes):
                raise ValueError(
                    f"dataset {self.name!r} lacks {key!r}, the image of camera {camera!r}, which {num_images} images "
                    f"per sample need; it has {', '.join(self.feature_names)}. Lower num_images_in_input or correct "
                    "the dataset's catalogue entry"
                )
        return tuple(keys)


def find_version(root: Path, name: str) -> Path:
    """The folder of a dataset's newest version. Raises FileNotFoundError naming what is there instead."""
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
    versions = [path for path in folder.iterdir() if path.is_dir() and _VERSION_NAME.match(path.name)]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=folder)


def find_shards(directory: Path) -> list[Path]:
    """All shards of all splits, sorted. Raises FileNotFoundError if there are none or one of a numbered set lacks."""
    paths = sorted(path for path in directory.iterdir() if _SHARD_NAME.search(path.name))
    if not paths:
        present = sorted(path.name for path in directory.iterdir())
        raise FileNotFoundError(
            f"dataset folder {directory} has no shards (*.tfrecord*); it holds {', '.join(present) or 'nothing'}. "
            "Download or collect the dataset again"
        )
    for path in paths:
        match = _SHARD_NAME.search(path.name)
        assert match is not None
        if match["count"] is None:
            continue
        stem = path.name[: match.start("number")]
        for number in range(int(match["count"])):
            sibling = path.with_name(f"{stem}{number:0{len(match['number'])}d}-of-{match['count']}")
            if not sibling.exists():
                raise FileNotFoundError(f"shard {sibling} is missing beside {path.name}: the copy is incomplete")
    return paths


def _episode(example: Example, spec: DatasetSpec, shards: ShardFiles, shard: int) -> Episode:
    """What the catalogue's entry names of one record. A camera that is not there is left out."""
    _require(example, spec, spec.language_key)
    steps = len(example.byte_ranges(spec.language_key))
    ranges = {camera: example.byte_ranges(key) for camera, key in spec.image_keys.items() if key in example}
    for camera, frames in ranges.items():
        if len(frames) != steps:
            raise ValueError(
                f"dataset {spec.name!r} has {len(frames)} images of camera {camera!r} for {steps} steps, in the record "
                f"at byte {example.start} of {example.path}"
            )
    match = _SHARD_NAME.search(example.path.name)
    state = _floats(example, spec, spec.state_key, (steps, spec.robot.proprio_dim)) if spec.state_key else None
    action = _floats(example, spec, spec.action_key, (steps, spec.robot.action_dim))
    if spec.map_episode is not None:
        action, kept = spec.map_episode(action, state)
        state = None if state is None else state[kept]
        ranges = {camera: frames[kept] for camera, frames in ranges.items()}
    return Episode(
        split=match["split"] if match else "train",
        instruction=example.text(spec.language_key),
        state=state,
        action=action,
        image_ranges=ranges,
        shard=shard,
        shards=shards,
    )


def _require(example: Example, spec: DatasetSpec, key: str) -> None:
    if key not in example:
        raise ValueError(
            f"dataset {spec.name!r} lacks {key!r}; {example.path.name} has {', '.join(sorted(example.features))}. "
            "Correct the dataset's catalogue entry"
        )


def _floats(example: Example, spec: DatasetSpec, key: str, shape: tuple[int, int]) -> np.ndarray:
    _require(example, spec, key)
    values, (steps, width) = example.floats(key), shape
    if len(values) != steps * width:
        raise ValueError(
            f"{key!r} of dataset {spec.name!r} has {len(values) / max(steps, 1):g} values per step, but robot "
            f"{spec.robot.name!r} needs {width} ({example.path.name}, {steps} steps). Correct the catalogue entry"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"{key!r} of dataset {spec.name!r} holds NaN or infinity, in the record at byte {example.start} of "
            f"{example.path}"
        )
    return values.reshape(shape)
