"""Runs starts one after the other in one process: keeps the simulator of the current task, saves what was recorded."""

from __future__ import annotations

import errno
import os
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.robot.libero.policies.contract import Queryable
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.record import EpisodeRecorder
from experiments.robot.libero.rollouts.rollout import Probe, Probes, RolloutSettings, new_record, run_episode
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.rollouts.video import RolloutRecorder
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import LiberoTask
from prismatic.recordings.archive import FOLDER


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
        only_failures: keep no video of a rollout that reached what its instruction asks.
        only: film the start of this key alone; None: no such choice.
    """

    every_steps: int
    max_per_task: int | None
    center_crop: bool
    control_rate_hz: float
    only_failures: bool = False
    only: tuple[str, int, int, int] | None = None

    def keeps(self, record: EpisodeRecord) -> bool:
        """Whether the video of an ended rollout is wanted."""
        reached = record.success if record.other_task is None else record.other_success
        return not (self.only_failures and reached)

    def recorder(self, start: Start) -> RolloutRecorder | None:
        if self.max_per_task is not None and start.trial >= self.max_per_task:
            return None
        if self.only not in (None, start.key):
            return None
        return RolloutRecorder(start.instruction, self.every_steps, self.center_crop, self.control_rate_hz)


@dataclass(frozen=True)
class RecordSettings:
    """What the records of episodes say beside what happened; see `EpisodeRecording`."""

    center_crop: bool
    control_rate_hz: float
    policy: dict[str, Any]


@dataclass(frozen=True)
class EpisodeSettings:
    """Everything a process must know to run starts; goes to worker processes as it is.

    Args:
        output_dir: where videos and records go, in folders of their own.
        video: None films nothing.
        record: None records nothing.
        name_suites: whether the names of videos and records begin with the suite, since there are several.
        probes: what else is asked of the policy, and kept below `output_dir`; None: nothing.
    """

    rollout: RolloutSettings
    environment: EnvironmentSettings
    output_dir: Path
    video: VideoSettings | None = None
    record: RecordSettings | None = None
    name_suites: bool = False
    probes: Probes | None = None


def is_full(error: BaseException) -> bool:
    """Whether there was no space left to write; ffmpeg says it in words."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return known or os.strerror(errno.ENOSPC) in str(error)


def no_space(folder: Path) -> OSError:
    """The error of a full disk."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


class EpisodeRunner:
    """Runs starts with one agent. The simulator stays as long as the task does, and is thrown away after an error."""

    def __init__(self, settings: EpisodeSettings, agent: Queryable) -> None:
        self._settings = settings
        self._agent = agent
        self._environment: LiberoEnvironment | None = None

    def run(self, start: Start) -> EpisodeRecord:
        """Roll out once, and save video and record where they are wanted. An error makes the rollout invalid.

        Raises:
            OSError: ENOSPC, when the disk is full: nothing more can be saved, and no rollout is to blame.
            PolicyLost: as the agent.
        """
        settings = self._settings
        if start.max_steps is not None and start.max_steps < settings.rollout.max_steps:
            settings = replace(settings, rollout=replace(settings.rollout, max_steps=start.max_steps))
        film = settings.video.recorder(start) if settings.video is not None else None
        memory = EpisodeRecorder(start, settings.rollout, **vars(settings.record)) if settings.record else None
        observers = [observer for observer in (film, memory) if observer is not None]
        probe = settings.probes.probe(start) if settings.probes is not None else None
        try:
            environment = self._environment_of(start.task)
        except Exception:
            record = new_record(start, settings.rollout.control)
            record.invalid = traceback.format_exc()
        else:
            record = run_episode(environment, self._agent, start, settings.rollout, observers, probe)
        if record.invalid is None:
            try:
                self._save(record, film, memory, probe)
            except Exception as error:
                if is_full(error):
                    raise no_space(settings.output_dir) from error
                record.success = record.other_success = record.video = record.record = None
                record.invalid = traceback.format_exc()
        if record.invalid is not None:
            self.close()  # the error may have left the simulator in any state
        return record

    def _save(
        self,
        record: EpisodeRecord,
        film: RolloutRecorder | None,
        memory: EpisodeRecorder | None,
        probe: Probe | None,
    ) -> None:
        stem = f"{record.suite}_{record.file_stem}" if self._settings.name_suites else record.file_stem
        video = self._settings.video
        if film is not None and video is not None and video.keeps(record):
            record.video = f"videos/{stem}.mp4"
            film.save(self._settings.output_dir / record.video)
        if memory is not None and memory.recording is not None:
            record.record = f"{FOLDER}/{stem}.npz"
            memory.recording.save(self._settings.output_dir / record.record)
        if probe is not None:
            probe.save(record, self._settings.output_dir, stem)

    def _environment_of(self, task: LiberoTask) -> LiberoEnvironment:
        if self._environment is not None and self._environment.task != task:
            self.close()
        if self._environment is None:
            self._environment = self._settings.environment.make(task)
        return self._environment

    def close(self) -> None:
        """Free the simulator; may be called twice."""
        environment, self._environment = self._environment, None
        if environment is not None:
            environment.close()
