"""Records of every control step of a robot: what training needs, whoever moved it, a policy or a person."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismatic.recordings.recording import Facts
from prismatic.recordings.rows import Row, RowFolder, finish_leftovers
from prismatic.vla.robots import RobotSpec

MAX_STEPS = 1000
"""Control steps in one file; a longer episode goes on in another part."""


class StepRecorder:
    """Writes the episodes of a robot into a folder, at the robot's side.

        recorder = StepRecorder(Path("records"), LIBERO)
        with recorder.episode("put the bowl on the plate") as episode:
            while not done:
                episode.step(observation, action)  # the observation before the action
            episode.success = True

    Args:
        folder: of the records; made where it is missing. What an earlier process left unfinished there is finished.
        robot: whose cameras, state and actions they are.
        policy: a description of who acts, if anybody should know.
        max_steps: control steps in one file.
    """

    def __init__(
        self, folder: Path, robot: RobotSpec, policy: Mapping[str, Any] | None = None, max_steps: int = MAX_STEPS
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finish_leftovers(folder)
        self.folder, self.facts, self.max_steps = folder, Facts(robot, policy=policy or {}), max_steps

    @contextmanager
    def episode(self, instruction: str, name: str = "") -> Iterator[StepEpisode]:
        """An episode, which ends with the block, an error included; one without any step leaves no file.

        Args:
            instruction: the sentence.
            name: part of the file's name.

        Raises:
            ValueError: for an empty instruction.
        """
        if not instruction.strip():
            raise ValueError("an episode needs an instruction: what the robot is to do, in a sentence")
        episode = StepEpisode(self, instruction, name)
        try:
            yield episode
        finally:
            episode.finish()


class StepEpisode:
    """One episode of a `StepRecorder`.

    Attributes:
        success: whether it reached its goal; set it before the block ends, or leave it None.
        paths: of the files that are finished.
    """

    def __init__(self, recorder: StepRecorder, instruction: str, name: str) -> None:
        self.success: bool | None = None
        self.paths: list[Path] = []
        self._recorder, self._instruction = recorder, instruction
        stamp = datetime.fromtimestamp(time.time(), timezone.utc).strftime("%Y%m%dT%H%M%S%f")
        self._stem = "_".join(filter(None, (stamp, re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60])))
        self._rows: RowFolder | None = None
        self._parts: list[tuple[RowFolder, NDArray[np.float64]]] = []
        self._action: NDArray[np.float64] | None = None
        self._steps = 0
        self._part = 1

    def step(self, observation: Mapping[str, Any], action: NDArray[Any]) -> None:
        """Note one control step.

        Args:
            observation: what the robot saw and felt before the action: its cameras, uint8 (H, W, 3), turned as a policy
                is given them, and its state.
            action: (action_dim,) what was then executed, of the policy's convention.

        Raises:
            ValueError: for a camera or a state that is missing, other sizes than the robot's or than before, and
                numbers that are not finite.
        """
        row = self._row(observation)
        checked = _vector(action, self._recorder.facts.robot.action_dim, "the action")
        if self._rows is not None and self._rows.last is not None and not row.fits(self._rows.last):
            before = {camera: picture.shape for camera, picture in self._rows.last.images.items()}
            now = {camera: picture.shape for camera, picture in row.images.items()}
            raise ValueError(f"pictures of one episode have one size; they were {before} and are now {now}")
        if self._rows is not None and self._rows.count >= self._recorder.max_steps:
            self._end_part()
            self._part += 1
        if self._rows is None:
            suffix = f"_part{self._part}" if self._part > 1 else ""
            header = self._recorder.facts.header("robot", self._instruction, self._stem, self._part)
            self._rows = RowFolder.begin(self._recorder.folder / f"{self._stem}{suffix}.npz", header)
        self._rows.append(row)
        self._action = checked
        self._steps += 1

    def finish(self) -> None:
        """Write the parts, all with the outcome; called at the end of the block."""
        if self._rows is not None and not self._rows.count:
            self._rows.discard()  # the disk took no first step
        elif self._rows is not None:
            self._end_part()
        for rows, last in self._parts:
            self.paths.append(rows.finish(last[None], self.success))
        self._parts = []

    def _end_part(self) -> None:
        assert self._rows is not None and self._action is not None
        self._parts.append((self._rows, self._action))
        self._rows = self._action = None

    def _row(self, observation: Mapping[str, Any]) -> Row:
        robot = self._recorder.facts.robot
        if missing := [key for key in (*robot.cameras, robot.state_key) if key not in observation]:
            raise ValueError(
                f"the observation lacks {missing}; robot {robot.name!r} has {[*robot.cameras]} and a state"
            )
        images = {camera: _picture(observation[camera], camera) for camera in robot.cameras}
        return Row(
            images=images,
            state=_vector(observation[robot.state_key], robot.proprio_dim, "the state"),
            time=time.time(),
            number=self._steps,
            executed=None if self._action is None else self._action[None],
        )


def _vector(values: Any, size: int, name: str) -> NDArray[np.float64]:
    vector = np.asarray(values, np.float64)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise ValueError(f"{name} is {vector.shape} {vector}; expected {size} finite numbers")
    return vector


def _picture(value: Any, camera: str) -> NDArray[np.uint8]:
    picture = np.asarray(value)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"{camera} is {picture.dtype} {picture.shape}; expected uint8 (H, W, 3), RGB from 0 to 255")
    return picture
