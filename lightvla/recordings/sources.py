"""Where episodes to learn from come from: records of every control step, or plain folders of frames.

A folder of frames, one per episode, or several of them in a folder:

    full_image/000000.png 000001.png ...   a folder per camera, named as the robot's cameras; PNG or JPEG
    wrist_image/000000.png ...
    states.npy        (T, proprio_dim)
    actions.npy       (T, action_dim): row t is what was executed after frame t
    instruction.txt   the sentence
    success.txt       `true` or `false`; may be left out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from experiments.robot.libero.rollouts.record import EpisodeRecording, load_any
from prismatic.recordings.archive import FOLDER
from prismatic.recordings.recording import Recording
from prismatic.vla.datasets.catalog import DatasetSpec
from prismatic.vla.images import decode_image, encode_jpeg

_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_ACTIONS = "actions.npy"
_STEP_RECORDS = (
    "record every control step at the robot (prismatic.recordings.steps.StepRecorder), or make such a record of an "
    "evaluation's with lightvla replay RECORD --record_steps FOLDER"
)


@dataclass(frozen=True, eq=False)
class Content:
    """An episode of T steps without its pictures.

    Attributes:
        instruction: the sentence.
        state: (T, proprio_dim).
        action: (T, action_dim), as the source has it.
        sizes: camera -> (height, width) of its pictures.
        success: whether it reached its goal; None where nobody said.
        policy_gripper: whether the actions are of the policy's convention.
    """

    instruction: str
    state: NDArray[np.float64]
    action: NDArray[np.float64]
    sizes: Mapping[str, tuple[int, int]]
    success: bool | None
    policy_gripper: bool


class Source(Protocol):
    """One episode."""

    @property
    def path(self) -> Path:
        """Of the file or folder."""

    def content(self, spec: DatasetSpec) -> Content:
        """Read and check it. Raises ValueError for what training cannot use, naming the remedy."""

    def pictures(self, cameras: Sequence[str], rotate: int) -> dict[str, list[bytes]]:
        """Camera -> its T pictures as JPEG, turned by `rotate` degrees counter-clockwise."""


@dataclass(frozen=True)
class RecordSource:
    """A record with an observation per control step."""

    path: Path

    def content(self, spec: DatasetSpec) -> Content:
        recording = _load(self.path)
        steps = _steps(recording, self.path)
        assert recording.actions is not None
        cameras = {camera: rows.shape[1:3] for camera, rows in recording.images.items()}
        content = Content(
            instruction=recording.instruction,
            state=np.asarray(recording.states[:steps], np.float64),
            action=np.asarray(recording.actions[:steps], np.float64),
            sizes={camera: (size[0], size[1]) for camera, size in cameras.items()},
            success=recording.success,
            policy_gripper=True,
        )
        _check(content, spec, self.path)
        return content

    def pictures(self, cameras: Sequence[str], rotate: int) -> dict[str, list[bytes]]:
        recording = _load(self.path)
        steps = _steps(recording, self.path)
        turns = rotate // 90
        return {c: [_jpeg(np.rot90(row, turns)) for row in recording.images[c][:steps]] for c in cameras}


@dataclass(frozen=True)
class FrameSource:
    """A folder of frames, states and actions."""

    path: Path

    def content(self, spec: DatasetSpec) -> Content:
        action, state = (_array(self.path / name) for name in (_ACTIONS, "states.npy"))
        instruction = _text(self.path / "instruction.txt")
        sizes = {}
        for camera in spec.robot.cameras:
            if (self.path / camera).is_dir():
                sizes[camera] = self._size(camera, len(action))
        content = Content(instruction, state, action, sizes, self._success(), policy_gripper=False)
        _check(content, spec, self.path)
        return content

    def pictures(self, cameras: Sequence[str], rotate: int) -> dict[str, list[bytes]]:
        return {camera: [self._stored(file, rotate) for file in self._files(camera)] for camera in cameras}

    def _files(self, camera: str) -> list[Path]:
        return sorted(file for file in (self.path / camera).iterdir() if file.suffix.lower() in _SUFFIXES)

    def _size(self, camera: str, steps: int) -> tuple[int, int]:
        """(height, width) of all pictures of a camera; reads the beginning of each file."""
        files = self._files(camera)
        if len(files) != steps:
            raise ValueError(
                f"{self.path / camera} holds {len(files)} pictures (PNG or JPEG) for {steps} actions; expected one for "
                "each, 000000.png and so on"
            )
        for number, file in enumerate(files):
            if not file.stem.isdigit() or int(file.stem) != number:
                raise ValueError(f"{file} is where frame {number:06d} is expected; number the frames from 000000 on")
        found: dict[tuple[int, int], Path] = {}
        for file in files:
            try:
                with Image.open(file) as picture:
                    if picture.format != _SUFFIXES[file.suffix.lower()]:
                        raise ValueError(f"{file} is a {picture.format} file under another name; rename it")
                    found.setdefault((picture.height, picture.width), file)
            except UnidentifiedImageError as error:
                raise ValueError(f"{file} is no picture that can be read; expected PNG or JPEG") from error
        if len(found) > 1:
            said = ", ".join(f"{file.name} {width} x {height}" for (height, width), file in found.items())
            raise ValueError(f"{self.path / camera} has pictures of several sizes ({said}); make them one size")
        return next(iter(found))

    def _stored(self, file: Path, rotate: int) -> bytes:
        """JPEG files as they are, all else compressed once."""
        data = file.read_bytes()
        if _SUFFIXES[file.suffix.lower()] == "JPEG" and not rotate:
            return data
        try:
            return _jpeg(np.rot90(decode_image(data), rotate // 90))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def _success(self) -> bool | None:
        file = self.path / "success.txt"
        if not file.is_file():
            return None
        said = file.read_text(encoding="utf-8").strip().lower()
        if said not in ("true", "false"):
            raise ValueError(f"{file} says {said!r}; expected true or false, or no such file")
        return said == "true"


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """Every record and folder of frames in some paths, each path's in the order of their names.

    Raises:
        FileNotFoundError: for a path that does not exist, or holds neither.
        ValueError: for an episode that two paths name, which would be learnt twice.
    """
    found: dict[Path, Source] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; expected records (.npz) or folders of frames")
        here = list(_sources_in(path))
        if not here:
            raise FileNotFoundError(
                f"{path} holds neither records (*.npz, or {FOLDER}/*.npz) nor folders of frames with {_ACTIONS}"
            )
        for source in here:
            if (twice := found.setdefault(source.path.resolve(), source)) is not source:
                raise ValueError(f"{source.path} is named twice ({twice.path}); name every episode once")
    return list(found.values())


def _sources_in(path: Path) -> Iterator[Source]:
    if path.is_file():
        yield RecordSource(path)
    elif (path / _ACTIONS).is_file():
        yield FrameSource(path)
    else:
        yield from map(RecordSource, sorted(path.glob("*.npz")) or sorted((path / FOLDER).glob("*.npz")))
        yield from (FrameSource(file.parent) for file in sorted(path.glob(f"*/{_ACTIONS}")))


def _load(path: Path) -> Recording:
    recording = load_any(path)
    return recording.seen_from_outside() if isinstance(recording, EpisodeRecording) else recording


def _steps(recording: Recording, path: Path) -> int:
    """How many steps have both an observation and the action behind it. Raises ValueError for other records."""
    if recording.actions is None or recording.steps is None:
        raise ValueError(
            f"{path} does not say which actions were executed, which training learns; let the client report them, or "
            f"{_STEP_RECORDS}"
        )
    if not np.array_equal(recording.steps, np.arange(len(recording))):
        raise ValueError(
            f"{path} holds pictures at its {len(recording)} policy queries only, of {len(recording.actions)} control "
            f"steps, and training needs one for every step: {_STEP_RECORDS}"
        )
    return min(len(recording), len(recording.actions))


def _check(content: Content, spec: DatasetSpec, path: Path) -> None:
    """Raises ValueError for what does not fit the robot."""
    robot, steps = spec.robot, len(content.action)
    if not content.instruction.strip():
        raise ValueError(f"{path} has no instruction; every episode needs its sentence")
    if not steps:
        raise ValueError(f"{path} has no actions; leave the episode out")
    for name, array, width in (
        ("actions", content.action, robot.action_dim),
        ("states", content.state, robot.proprio_dim),
    ):
        if array.shape != (steps, width):
            raise ValueError(
                f"{path}: {name} are {array.shape}; robot {robot.name!r} and {steps} steps need ({steps}, {width})"
            )
        if (odd := ~np.isfinite(array).all(1)).any():
            raise ValueError(f"{path}: {name} hold NaN or infinity at step {odd.argmax()}; leave the episode out")
    if robot.cameras[0] not in content.sizes:
        raise ValueError(
            f"{path} lacks the camera {robot.cameras[0]!r}; it has {sorted(content.sizes)}, robot {robot.name!r} reads "
            f"{', '.join(robot.cameras)}"
        )


def _array(file: Path) -> NDArray[np.float64]:
    """Raises ValueError for what is no array of numbers (T, width)."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: an episode needs its actions.npy and states.npy")
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file} is no array of numbers that numpy.save wrote, or is damaged") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 2:
        kind = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{file} holds {kind}; expected numbers, a row per step")
    return array.astype(np.float64)


def _text(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"{file} is missing: it holds the episode's sentence")
    try:
        return file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not written in UTF-8") from error


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    return encode_jpeg(np.ascontiguousarray(picture))
