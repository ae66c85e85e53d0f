"""Runs starts one after the other in one process: keeps the simulator of the current task, saves what was recorded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from experiments.robot.libero.agents import Answers
from experiments.robot.libero.environment import LiberoEnvironment, LiberoTask
from experiments.robot.libero.results import EpisodeRecord
from experiments.robot.libero.rollout import RolloutRecorder, RolloutSettings, Start, run_episode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnvironmentSettings:
    """How simulators are made; see `LiberoEnvironment`."""

    resolution: int
    render: bool
    seed: int
    renderer: str
    settle_steps: int
    canonical_quaternion: bool

    def make(self, task: LiberoTask) -> LiberoEnvironment:
        return LiberoEnvironment(
            task,
            self.resolution,
            self.render,
            self.seed,
            self.renderer,
            self.settle_steps,
            self.canonical_quaternion,
        )


@dataclass(frozen=True)
class VideoSettings:
    """Which rollouts are filmed, and how; see `RolloutRecorder`.

    Args:
        max_per_task: the first so many trials of each task; None: all.
    """

    every_steps: int
    max_per_task: int | None
    center_crop: bool
    control_rate_hz: float

    def recorder(self, start: Start) -> RolloutRecorder | None:
        if self.max_per_task is not None and start.trial >= self.max_per_task:
            return None
        return RolloutRecorder(start.instruction, self.every_steps, self.center_crop, self.control_rate_hz)


@dataclass(frozen=True)
class EpisodeSettings:
    """Everything a process must know to run starts; goes to worker processes as it is.

    Args:
        output_dir: where videos go, in a folder of their own.
        video: None films nothing.
    """

    rollout: RolloutSettings
    environment: EnvironmentSettings
    output_dir: Path
    video: VideoSettings | None = None


class EpisodeRunner:
    """Runs starts with one agent. The simulator stays as long as the task does, and is thrown away after an error."""

    def __init__(self, settings: EpisodeSettings, agent: Answers) -> None:
        self._settings = settings
        self._agent = agent
        self._environment: LiberoEnvironment | None = None

    def run(self, start: Start) -> EpisodeRecord:
        """Roll out once, and save the video where one is wanted. An error makes the record invalid."""
        recorder = self._settings.video.recorder(start) if self._settings.video is not None else None
        record = run_episode(self._environment_of, self._agent, start, self._settings.rollout, recorder)
        if recorder is not None and recorder.frames:
            record.video = f"videos/{video_name(record)}"
            recorder.save(self._settings.output_dir / record.video)
        if record.invalid is not None:
            self.close()  # the error may have left the simulator in any state
        return record

    def _environment_of(self, task: LiberoTask) -> LiberoEnvironment:
        if self._environment is not None and self._environment.task != task:
            self.close()
        if self._environment is None:
            self._environment = self._settings.environment.make(task)
        return self._environment

    def close(self) -> None:
        """Free the simulator; may be called twice."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None


def video_name(record: EpisodeRecord) -> str:
    """`task1_state30_trial0_success.mp4`."""
    outcome = {True: "success", False: "failure", None: "invalid"}[record.success]
    return f"task{record.task_index}_state{record.initial_state}_trial{record.trial}_{outcome}.mp4"
