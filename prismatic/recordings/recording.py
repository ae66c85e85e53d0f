"""Episodes as a server or a robot saw them: observations, action chunks, and what is known of the actions executed.

The format of an evaluation's records (`experiments/robot/libero/rollouts/record.py`) without what only a simulator
knows. What nobody has said is None, and never made up.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from prismatic.atomic_files import replacing
from prismatic.recordings.archive import (
    IMAGES,
    check_arrays,
    packed,
    read_arrays,
    read_header,
    refuse_objects,
    undone,
    unpacked,
    unusable_header,
)
from prismatic.vla.robots import RobotSpec

FORMAT_VERSION = 3
"""Versions 1 and 2 are an evaluation's."""
_COMPRESSION = 3
"""Of zlib: twice as fast as its usual 6, for files that are 4 % larger (rendered pictures at 128 px)."""
SOURCES = ("server", "robot", "evaluation")

_ROWS = {"states": 2, "times": 1, "numbers": 1, "steps": 1, "chunks": 3, "kept": 2, "picks": 2, "scores": 2}
"""Arrays with a row per observation -> their axes."""
_AXES = {**_ROWS, "actions": 2}


@dataclass(kw_only=True)
class Recording:
    """One episode, or a part of a long one: L observations, and T executed actions where those are known.

    Attributes:
        source: who saw it: a `server`, a `robot`'s own side, or an `evaluation`.
        instruction: the sentence.
        images: camera -> (L, H, W, 3) uint8, turned as the policy is given them.
        states: (L, P) the robot's state; P is 0 where a policy that reads none was not told.
        times: (L,) when each came, in seconds since 1970; None where nobody said.
        numbers: (L,) number of each policy query, or control step, in its episode; a gap is one that was missed.
        steps: (L,) how many of `actions` had been executed at each observation; None where `actions` is None.
        chunks: (L, chunk, action_dim) action chunks that the policy answered with, in the robot's units; None where
            nobody asked one.
        actions: (T, action_dim) what was executed, of the policy's convention (LIBERO's gripper 1 = open); None where
            that is not known. The last ones may be missing: a server hears of them with the next request.
        kept: (L, V) bool, the visual tokens that stayed, image by image and inside an image row by row, or None.
        picks, scores: (L, V) as in `TokenSelection`, or None.
        success: whether the episode reached its goal, where somebody said so.
        session: the episode as the client named it.
        part: counts the parts of a long episode from 1.
        warnings: per observation, what the server flagged about the answer.
        robot: `RobotSpec.to_json()`, or empty.
        center_crop: whether the policy saw the central part of the pictures only, where there was one.
        control_rate_hz: control steps per second, or None.
        policy: a description of the policy.
        versions: package -> version.
    """

    source: str
    instruction: str
    images: dict[str, NDArray[np.uint8]]
    states: NDArray[np.float64]
    times: NDArray[np.float64] | None = None
    numbers: NDArray[np.int64] | None = None
    steps: NDArray[np.int64] | None = None
    chunks: NDArray[np.float64] | None = None
    actions: NDArray[np.float64] | None = None
    kept: NDArray[np.bool_] | None = None
    picks: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None
    success: bool | None = None
    session: str = ""
    part: int = 1
    warnings: list[list[str]] = field(default_factory=list)
    robot: dict[str, Any] = field(default_factory=dict)
    center_crop: bool | None = None
    control_rate_hz: float | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """L."""
        return len(self.states)

    def save(self, path: str | Path) -> None:
        """Write atomically: a crash leaves nothing under the final name, or what stood there before.

        Raises:
            ValueError: for arrays of Python objects.
        """
        arrays = {name: value for name in _AXES if (value := getattr(self, name)) is not None}
        header = {name: getattr(self, name) for name in _HEADER}
        pictures = {camera: (rows.shape, iter(rows)) for camera, rows in self.images.items()}
        with replacing(path) as partial, partial.open("wb") as file:
            write_recording(file, header, arrays, pictures)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read and check one file.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is no such record, is damaged, lacks something, or was written in another format.
        """
        path = Path(path)
        return cls.from_arrays(path, read_arrays(path))

    @classmethod
    def from_arrays(cls, path: Path, arrays: dict[str, NDArray[Any]]) -> Recording:
        """What `load` makes of the arrays of a file; raises ValueError as it does."""
        header = read_header(path, arrays, (FORMAT_VERSION,))
        _check_header(path, header)
        names = [IMAGES + camera for camera in header["cameras"]]
        if missing := [name for name in ("states", *names) if name not in arrays]:
            raise ValueError(f"{path} lacks the arrays {missing}; it holds {sorted(arrays)}. Record the episode again")
        check_arrays(path, arrays, _AXES)
        parts: dict[str, Any] = {name: header[name] for name in _HEADER}
        parts |= {name: arrays[name] for name in _AXES if name in arrays}
        if "kept" in arrays:
            parts["kept"] = unpacked(arrays["kept"], header["num_visual_tokens"])
        images = {camera: undone(arrays[IMAGES + camera]) for camera in header["cameras"]}
        recording = cls(images=images, **parts)
        recording.check(path)
        return recording

    def check(self, where: str | Path = "the recording") -> None:
        """Raises ValueError when its parts do not fit together: numbers of observations, actions and steps."""
        rows = {name: len(pictures) for name, pictures in self.images.items()}
        rows |= {name: len(value) for name in _ROWS if (value := getattr(self, name)) is not None}
        if len(set(rows.values())) != 1 or not len(self):
            raise ValueError(f"{where}: numbers of observations differ, or there are none: {rows}")
        if (self.steps is None) != (self.actions is None):
            raise ValueError(f"{where} has only one of steps and actions, which belong together")
        if self.steps is not None and self.actions is not None:
            ordered = bool(np.all(np.diff(self.steps, prepend=0) >= 0))
            if not ordered or self.steps[-1] > len(self.actions):
                raise ValueError(
                    f"{where}: the steps of its observations ({self.steps[0]} to {self.steps[-1]}) do not lie in order "
                    f"within its {len(self.actions)} actions"
                )


@dataclass(frozen=True)
class Facts:
    """What is the same in all records that one server, or one robot, makes.

    Attributes:
        robot: whose conventions observations and actions follow.
        center_crop: whether the policy sees the central part of the pictures only; None where there is none.
        policy: a description of the policy.
        versions: package -> version.
    """

    robot: RobotSpec
    center_crop: bool | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def header(self, source: str, instruction: str, session: str = "", part: int = 1) -> dict[str, Any]:
        """Entries of a `Recording` that are no arrays, but for what is only known at its end."""
        return {
            "source": source,
            "instruction": instruction,
            "success": None,
            "session": session,
            "part": part,
            "warnings": [],
            "robot": self.robot.to_json(),
            "center_crop": self.center_crop,
            "control_rate_hz": self.robot.control_rate_hz,
            "policy": dict(self.policy),
            "versions": dict(self.versions),
        }


_HEADER = (
    "source", "instruction", "success", "session", "part", "warnings", "robot", "center_crop", "control_rate_hz",
    "policy", "versions",
)  # fmt: skip


def write_recording(
    file: BinaryIO,
    header: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    pictures: Mapping[str, tuple[tuple[int, ...], Iterable[NDArray[np.uint8]]]],
) -> None:
    """Write a record with one picture in memory at a time.

    Args:
        file: to write to.
        header: `_HEADER`'s entries.
        arrays: the others, `kept` as bool.
        pictures: camera -> the shape (L, H, W, 3) and the L pictures.

    Raises:
        ValueError: for arrays of Python objects.
    """
    refuse_objects("a record", arrays)
    content = {"format_version": FORMAT_VERSION, "cameras": list(pictures), **header}
    stored = dict(arrays)
    if "kept" in arrays:
        content["num_visual_tokens"] = arrays["kept"].shape[1]
        stored["kept"] = packed(arrays["kept"])
    stored["header"] = np.array(json.dumps(content, default=str))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION) as archive:
        for name, array in stored.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        for camera, (shape, rows) in pictures.items():
            with archive.open(f"{IMAGES}{camera}.npy", "w", force_zip64=True) as member:
                layout = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, layout)
                before = np.zeros(shape[1:], np.uint8)
                for picture in rows:
                    member.write((picture - before).tobytes())
                    before = picture


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Raises ValueError for a header that lacks entries, or has some of other types than are written."""
    if missing := [name for name in (*_HEADER, "cameras") if name not in header]:
        raise unusable_header(path, f"it lacks {missing}; it has {sorted(header)}")
    rate, cameras, part = header["control_rate_hz"], header["cameras"], header["part"]
    tokens = header.get("num_visual_tokens", 1)
    fits = {
        "source": header["source"] in SOURCES,
        "instruction or session": isinstance(header["instruction"], str) and isinstance(header["session"], str),
        "success or center_crop": all(header[name] in (None, True, False) for name in ("success", "center_crop")),
        "part or num_visual_tokens": all(isinstance(count, int) and count >= 1 for count in (part, tokens)),
        "cameras": isinstance(cameras, list) and bool(cameras) and all(isinstance(name, str) for name in cameras),
        "control_rate_hz": rate is None or (isinstance(rate, int | float) and 0 < rate < math.inf),
        **{name: isinstance(header[name], dict) for name in ("robot", "policy", "versions")},
        "warnings": isinstance(header["warnings"], list),
    }
    if wrong := [name for name, right in fits.items() if not right]:
        raise unusable_header(path, f"it has entries of another kind: {', '.join(wrong)}")
