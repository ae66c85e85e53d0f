"""A record of every control step of a rollout or replay: what training needs, which an evaluation's records lack."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.policies.contract import ActionChunk, Observation
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.rollout import Moment
from prismatic.recordings.steps import StepEpisode, StepRecorder
from prismatic.vla.robots import LIBERO


class StepObserver:
    """Observes a rollout as a robot of its own would, and writes each control step; a broken one leaves a record too.

    Args:
        folder: of the records.
        instruction: the sentence.
        name: part of the file's name.
        policy: a description of who acts.
    """

    def __init__(self, folder: Path, instruction: str, name: str, policy: dict[str, Any]) -> None:
        self._recorder = StepRecorder(folder, LIBERO, policy)
        self._stack = ExitStack()
        self._episode: StepEpisode = self._stack.enter_context(self._recorder.episode(instruction, name))
        self._seen: dict[str, NDArray[Any]] | None = None

    @property
    def paths(self) -> list[Path]:
        """Of the files, once the rollout has ended."""
        return self._episode.paths

    def on_query(self, moment: Moment, observation: Observation, chunk: ActionChunk) -> None:
        """The first query is asked about what is seen before the first action."""
        if self._seen is None:
            self._seen = _observe(moment)

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        """What was seen before the action goes to the disk; what is seen now is for the next."""
        assert self._seen is not None
        self._episode.step(self._seen, action)
        self._seen = _observe(moment)

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        """Write the record, with the outcome."""
        self._episode.success = record.success if record.other_task is None else record.other_success
        self._stack.close()


def _observe(moment: Moment) -> dict[str, NDArray[Any]]:
    environment = moment.environment
    return {**{camera: environment.frame(camera) for camera in LIBERO.cameras}, "state": environment.state()}
