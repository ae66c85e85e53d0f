"""A dataset as it is stored: values of every frame, and pictures looked at, whatever is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from prismatic.vla.datasets.catalog import DatasetSpec
from prismatic.vla.datasets.entries.opening import open_dataset
from prismatic.vla.datasets.stored.episode import Episode, UnreadableImage
from prismatic.vla.datasets.stored.index import DatasetIndex

_ONE_COLOUR = 2.0  # grey levels of deviation: below, a picture shows nothing
_BLACK = 12.0  # grey levels: a picture of one colour below is called black

Place = tuple[int, int]
"""Episode and step, both counted from 0."""


@dataclass(frozen=True)
class CameraView:
    """What was found of one camera.

    Attributes:
        looked: how many pictures were decoded.
        sizes: (height, width) -> how many of those.
        black: those of one dark colour.
        blank: those of one other colour.
        unreadable: those that cannot be decoded, and why.
        repeated: (N,) per frame of the dataset, whether its picture is the previous one of its episode, byte for byte.
    """

    looked: int
    sizes: Counter[tuple[int, int]]
    black: Sequence[Place]
    blank: Sequence[Place]
    unreadable: Sequence[tuple[Place, str]]
    repeated: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class StoredDataset:
    """A dataset of E episodes and N frames.

    Attributes:
        index: as it is stored, NaN and episodes without instruction included.
        cameras: by name, those that every episode has and whose pictures are read.
        lacking: camera -> why its pictures are not read.
        unread_state: why there is no state; empty where there is one, or none is named.
    """

    index: DatasetIndex
    cameras: dict[str, CameraView]
    lacking: dict[str, str]
    unread_state: str = ""

    @property
    def episodes(self) -> Sequence[Episode]:
        return self.index.episodes

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(E,) frames."""
        return np.array([episode.num_frames for episode in self.episodes], np.int64)

    @cached_property
    def actions(self) -> NDArray[np.float64]:
        """(N, A) as stored."""
        return np.concatenate([episode.action for episode in self.episodes]).astype(np.float64)

    @cached_property
    def states(self) -> NDArray[np.float64] | None:
        """(N, P)."""
        found = [episode.state for episode in self.episodes if episode.state is not None]
        return np.concatenate(found).astype(np.float64) if found else None

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """(E,) number of the first frame of each episode."""
        return np.cumsum(self.lengths) - self.lengths

    def place(self, frame: int) -> Place:
        """Where the frame of that number is."""
        episode = int(np.searchsorted(self.firsts + self.lengths, frame, side="right"))
        return episode, int(frame - self.firsts[episode])

    def policy_actions(self) -> NDArray[np.float64] | None:
        """(N, A) with the gripper as the policy's, 1 open; None where nobody says how it is stored."""
        try:
            return np.asarray(self.index.spec.map_actions(self.actions), np.float64)
        except ValueError:
            return None


def read_dataset(folder: Path, spec: DatasetSpec, pictures: int, console: Console) -> StoredDataset:
    """Read a dataset and look at its pictures.

    Args:
        folder: DATA/NAME.
        spec: how it is read.
        pictures: of each camera so many are decoded, evenly spread, and as many of those that take the fewest bytes.
        console: shows progress.

    Raises:
        ValueError, FileNotFoundError: as `open_dataset`, but for NaN and missing instructions.
    """
    unread = ""
    try:
        index = open_dataset(folder.parent, folder.name, spec, as_stored=True)
    except ValueError as error:
        try:  # what is wrong with the state alone does not matter to a policy without
            index = open_dataset(folder.parent, folder.name, spec, use_state=False, as_stored=True)
        except ValueError:
            raise error from None
        unread = str(error)
    lacking = dict(index.odd_images)
    for camera, key in spec.image_keys.items():
        if camera not in lacking and any(camera not in episode.cameras for episode in index.episodes):
            lacking[camera] = f"{key!r} is not there; stored are {', '.join(index.feature_names)}"
    cameras = {
        camera: _look(index.episodes, camera, pictures, console) for camera in spec.image_keys if camera not in lacking
    }
    return StoredDataset(index, cameras, lacking, unread)


def _look(episodes: Sequence[Episode], camera: str, pictures: int, console: Console) -> CameraView:
    sizes: Counter[tuple[int, int]] = Counter()
    black: list[Place] = []
    blank: list[Place] = []
    unreadable: list[tuple[Place, str]] = []
    repeated = [_repeats(episode, camera) for episode in episodes]
    chosen = _chosen(episodes, camera, pictures)
    for number, step in _progress(chosen, f"looking at {camera}", console):
        try:
            picture = episodes[number].image(camera, step)
        except UnreadableImage as error:
            unreadable.append(((number, step), str(error)))
            continue
        sizes[picture.shape[0], picture.shape[1]] += 1
        if picture.reshape(-1, 3).std(0).max() < _ONE_COLOUR:
            (black if picture.mean() < _BLACK else blank).append((number, step))
    return CameraView(len(chosen), sizes, black, blank, unreadable, np.concatenate(repeated))


def _repeats(episode: Episode, camera: str) -> NDArray[np.bool_]:
    """(T,) whether a picture equals the one before it; only those of equal length are read, and none of a video."""
    lengths = episode.encoded_sizes(camera)
    found = np.zeros(episode.num_frames, bool)
    if lengths is None:
        return found
    for step in (1 + np.flatnonzero(np.diff(lengths) == 0)).tolist():
        found[step] = episode.image_bytes(camera, step) == episode.image_bytes(camera, step - 1)
    return found


def _chosen(episodes: Sequence[Episode], camera: str, pictures: int) -> list[Place]:
    """Frames evenly spread over the dataset; and of episodes those with the fewest bytes, as pictures of nothing."""
    frames = [(number, step) for number, episode in enumerate(episodes) for step in range(episode.num_frames)]
    spread = np.unique(np.linspace(0, len(frames) - 1, min(pictures, len(frames))).round().astype(int)).tolist()
    least = []
    for number, episode in enumerate(episodes):
        lengths = episode.encoded_sizes(camera)
        if lengths is not None and len(lengths):
            least.append((int(lengths.min()), number, int(lengths.argmin())))
    smallest = [(number, step) for _, number, step in sorted(least)[:pictures]]
    return sorted({*(frames[place] for place in spread), *smallest})


def _progress(places: list[Place], description: str, console: Console) -> Iterator[Place]:
    yield from track(places, description, console=console, transient=True, disable=not console.is_terminal)
