"""LeRobot datasets of the versions 2.0, 2.1 and 3.0 as a frame index: values in memory, pictures in their files."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.catalog import DatasetSpec, get_dataset_spec
from prismatic.vla.datasets.lerobot.copies import FlatPictures, flat_pictures
from prismatic.vla.datasets.lerobot.features import Features
from prismatic.vla.datasets.lerobot.layout import INFO, EpisodeEntry, Layout
from prismatic.vla.datasets.lerobot.libraries import check_libraries
from prismatic.vla.datasets.lerobot.tables import EpisodeValues, read_values, tables_of
from prismatic.vla.datasets.lerobot.videos import VideoFiles, VideoHeading, key_frame_spacing
from prismatic.vla.datasets.stored.episode import Episode, UnreadableImage
from prismatic.vla.datasets.stored.index import DatasetIndex, tell_about_instructions
from prismatic.vla.images import decode_image

logger = logging.getLogger(__name__)

_FAR_APART = 12  # frames between key frames from which on reading at random is slow
_ENDS = 1 << 16  # bytes at both ends of a file of pictures that go into the fingerprint: there stand its tables


@dataclass(frozen=True)
class VideoPictures:
    """The pictures of a camera in an episode, frames of a video.

    Attributes:
        files: the dataset's videos.
        number: of the video among those.
        times: (T,) float64, where in the video each frame is, in seconds.
    """

    files: VideoFiles
    number: int
    times: np.ndarray = field(repr=False)

    def decoded(self, step: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableImage."""
        return self.files.frame(self.number, float(self.times[step]))


@dataclass(frozen=True)
class TablePictures:
    """The pictures of a camera in an episode, rows of a Parquet file that were copied.

    Attributes:
        flat: the copies of the whole dataset.
        frames: (T,) int64, their numbers there.
    """

    flat: FlatPictures = field(repr=False)
    frames: np.ndarray = field(repr=False)

    def stored(self, step: int) -> bytes:
        """JPEG or PNG, as it was written."""
        return self.flat.stored(int(self.frames[step]))

    def decoded(self, step: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableImage."""
        try:
            return decode_image(self.stored(step))
        except ValueError as error:
            raise UnreadableImage(f"picture {self.frames[step]} of {self.flat.path}: {error}") from error


@dataclass(frozen=True)
class LeRobotEpisode(Episode):
    """One episode of T steps.

    Attributes:
        pictures: camera name -> its pictures.
        number: `episode_index`.
    """

    pictures: Mapping[str, VideoPictures | TablePictures] = field(repr=False)
    number: int

    @property
    def cameras(self) -> Set[str]:
        return self.pictures.keys()

    def encoded_sizes(self, camera: str) -> np.ndarray | None:
        pictures = self.pictures[camera]
        return np.diff(pictures.flat.ends)[pictures.frames] if isinstance(pictures, TablePictures) else None

    def image_bytes(self, camera: str, step: int) -> bytes:
        pictures = self.pictures[camera]
        if not isinstance(pictures, TablePictures):
            raise ValueError(f"the pictures of camera {camera!r} are a video, and have no bytes of their own")
        return pictures.stored(step)

    def decoded(self, camera: str, step: int) -> np.ndarray:
        try:
            return self.pictures[camera].decoded(step)
        except UnreadableImage as error:
            raise UnreadableImage(f"camera {camera!r} of episode {self.number}, step {step}: {error}") from error


@dataclass(frozen=True)
class LeRobotIndex(DatasetIndex):
    """All episodes of one LeRobot dataset, in the order of their numbers.

    Its fingerprint is of states, actions, sentences and times, and of the names, sizes and ends of all files.
    """

    @classmethod
    def open(
        cls,
        root: Path | str,
        name: str,
        spec: DatasetSpec | None = None,
        use_state: bool = True,
        as_stored: bool = False,
    ) -> "LeRobotIndex":
        """Index `<root>/<name>`, whose `meta/info.json` says what it is.

        Args:
            root: folder of datasets.
            name: the dataset's folder.
            spec: how to read it, by the names of RLDS or of LeRobot (`Features`); the catalogue's entry by default.
            use_state: whether the policy reads the state; else its width and kind do not matter.
            as_stored: keep episodes without an instruction, and NaN; training leaves those out and refuses these.

        Raises:
            ValueError: another version, a library that lacks, files that are damaged or disagree about lengths, values
                that do not fit the robot. Single pictures that do not decode are found when they are read.
            FileNotFoundError: a file is missing.
        """
        layout = Layout.read(Path(root).expanduser() / name)
        spec = spec or get_dataset_spec(name)
        check_libraries(layout, spec)
        features = Features.of(layout, spec, use_state)
        reader = _Reader(layout, features, layout.episodes(), use_state, finite=not as_stored)
        found = [reader.episode(values) for values in read_values(layout, reader.entries, features.columns)]
        episodes = [episode for episode in found if episode.instruction or as_stored]
        if not episodes:
            raise ValueError(f"none of the {len(found)} episodes of {layout.folder} has an instruction")
        if not as_stored:
            tell_about_instructions(name, episodes, len(found))
        rate = spec.robot.control_rate_hz
        if layout.fps != rate:
            logger.warning(
                "%s: recorded at %g frames per second, and robot %r is controlled at %g Hz: an action per frame is one "
                "per control step. If only the number is wrong, as in conversions of LIBERO, nothing needs doing",
                name, layout.fps, spec.robot.name, rate,
            )  # fmt: skip
        logger.info("%s: LeRobot %s, %d episodes of %s; %s", name, layout.version, len(found), layout.folder, features)
        return cls(
            spec=features.spec,
            directory=layout.folder,
            episodes=episodes,
            feature_names=tuple(layout.features),
            fingerprint=reader.fingerprint(),
            files=reader.files,
            fps=layout.fps,
            labels=features.labels(layout),
        )


class _Reader:
    """Rows and files to episodes."""

    def __init__(
        self, layout: Layout, features: Features, entries: Sequence[EpisodeEntry], use_state: bool, finite: bool
    ):
        self.layout = layout
        self.features = features
        self.entries = entries
        self.use_state = use_state
        self.finite = finite
        self.sentences = layout.sentences()
        kinds = {camera: layout.features[name]["dtype"] for camera, name in features.cameras.items()}
        self._flat = {
            camera: flat_pictures(layout.folder, name, tables_of(entries))
            for camera, name in features.cameras.items()
            if kinds[camera] == "image"
        }
        paths = [entry.videos[name].path for entry in entries for name in self._video_features()]
        self._videos = VideoFiles(list(dict.fromkeys(paths)))
        self._check_videos()
        self._digest = hashlib.sha256(b"lerobot 1")

    @property
    def files(self) -> list[Path]:
        """Those of values and pictures."""
        return [*tables_of(self.entries), *self._videos.paths]

    def fingerprint(self) -> str:
        """Of what was read so far and of all files."""
        for path in self.files:
            with path.open("rb") as file:
                size = path.stat().st_size
                self._digest.update(f"{path.relative_to(self.layout.folder)} {size}\0".encode())
                self._digest.update(file.read(_ENDS))
                file.seek(max(size - _ENDS, 0))
                self._digest.update(file.read(_ENDS))
        return f"sha256:{self._digest.hexdigest()}"

    def episode(self, values: EpisodeValues) -> LeRobotEpisode:
        """Raises ValueError for values that do not fit the robot, and sentences that lack."""
        spec, entry = self.features.spec, values.entry
        needs_state = self.use_state or spec.map_episode is not None
        action = self._floats(values, self.features.action, spec.robot.action_dim)
        state = None
        if self.features.state and needs_state:
            state = self._floats(values, self.features.state, spec.robot.proprio_dim)
        texts = self._texts(values)
        steps = slice(None)
        if spec.map_episode is not None:
            action, steps = spec.map_episode(action, state)
            state = None if state is None else state[steps]
        for array in (action, state, values.columns["timestamp"]):
            self._digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        self._digest.update(json.dumps(texts).encode())
        return LeRobotEpisode(
            split=self.layout.split_of(entry.number),
            instructions=tuple(texts[steps]),
            state=state if self.use_state else None,
            action=action,
            pictures={camera: self._pictures(camera, values, steps) for camera in self.features.cameras},
            number=entry.number,
            turns=spec.turns,
        )

    def _pictures(self, camera: str, values: EpisodeValues, steps: slice) -> VideoPictures | TablePictures:
        if camera in self._flat:
            return TablePictures(self._flat[camera], (values.first_row + np.arange(values.entry.length))[steps])
        part = values.entry.videos[self.features.cameras[camera]]
        times = part.start + values.columns["timestamp"].astype(np.float64).reshape(-1)
        return VideoPictures(self._videos, self._number_of[part.path], times[steps])

    def _video_features(self) -> list[str]:
        return [name for name in self.features.cameras.values() if self.layout.features[name]["dtype"] == "video"]

    def _check_videos(self) -> None:
        """Raises ValueError for a video that cannot be opened, or does not show its episodes one behind the other."""
        self._number_of = {path: number for number, path in enumerate(self._videos.paths)}
        parts: dict[Path, list[tuple[float, EpisodeEntry]]] = {path: [] for path in self._videos.paths}
        for entry in self.entries:
            for name in self._video_features():
                parts[entry.videos[name].path].append((entry.videos[name].start, entry))
        for path, inside in parts.items():
            self._check_video(path, inside)
        for path in self._videos.paths[:1]:
            if (spacing := key_frame_spacing(path)) > _FAR_APART:
                logger.warning(
                    "%s: a key frame every %.0f frames, so one picture at random takes many to be decoded. Encode the "
                    "videos again with a key frame every second one: ffmpeg -i OLD -c:v libx264 -crf 18 -g 2 NEW",
                    path, spacing,
                )  # fmt: skip

    def _check_video(self, path: Path, parts: list[tuple[float, EpisodeEntry]]) -> None:
        """Parts: from which second on the video shows which episode."""
        heading = VideoHeading.read(path)
        count = sum(entry.length for _, entry in parts)
        if heading.frames != count:
            raise ValueError(
                f"the video {path} has {heading.frames} frames, and its episodes have {count} rows: the copy is "
                "incomplete, or the recording broke off. Download the dataset again, or take the episode out"
            )
        before = 0
        for start, entry in sorted(parts, key=lambda part: part[0]):
            if abs(start - before / self.layout.fps) > 0.5 / self.layout.fps:
                raise ValueError(
                    f"{entry.listed_in} has episode {entry.number} begin at {start:.4f} s of the video {path}, where "
                    f"the {before} frames of the episodes before it end at {before / self.layout.fps:.4f} s: it would "
                    "show another episode's pictures. Mend its from_timestamp, or download the dataset again"
                )
            before += entry.length

    def _texts(self, values: EpisodeValues) -> list[str]:
        if self.features.language:
            return [str(text).strip() for text in values.columns[self.features.language]]
        numbers = values.columns["task_index"].reshape(-1).tolist()
        if lacking := {*numbers} - self.sentences.keys():
            raise ValueError(
                f"episode {values.entry.number} in {values.entry.table} has task_index {min(lacking)}, which "
                f"{self.layout.folder / 'meta'} has no task for: its tasks are {sorted(self.sentences)}"
            )
        return [self.sentences[number] for number in numbers]

    def _floats(self, values: EpisodeValues, name: str, width: int) -> np.ndarray:
        found, spec = values.columns[name], self.features.spec
        remedy = ", or train with --use_proprio False, which does not read it" if name == self.features.state else ""
        if found.dtype.kind not in "fiu" or found.ndim != 2 or found.shape[1] != width:
            wide = found.shape[1] if found.ndim == 2 else 1
            raise ValueError(
                f"{name!r} of dataset {spec.name!r} has {wide} values per frame, but robot {spec.robot.name!r} needs "
                f"{width} ({self.layout.folder / INFO} calls them {', '.join(self.layout.labels(name)) or 'nothing'}). "
                f"Say the robot, or another feature (--dataset_spec){remedy}"
            )
        floats = found.astype(np.float32)
        if self.finite and (odd := ~np.isfinite(floats).all(1)).any():
            raise ValueError(
                f"{name!r} of dataset {spec.name!r} holds NaN or infinity at step {odd.argmax()} of episode "
                f"{values.entry.number} ({values.entry.table}). Write the episode again without that step{remedy}"
            )
        return floats
