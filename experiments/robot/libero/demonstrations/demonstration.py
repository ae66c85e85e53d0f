"""One demonstration: an expert drives the environment, is pushed now and then, and every step is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.demonstrations.experts import CLOSED, OPEN, Action, Expert, ExpertFailed
from experiments.robot.libero.settings.suite_names import step_cap
from experiments.robot.libero.simulator.environment import LiberoEnvironment

MIN_SEGMENT = 9
"""Fewest steps of a segment: a chunk of 8 actions from each of at least two frames."""


@dataclass(frozen=True)
class Pushes:
    """Short random motions that throw the robot off its way, so that the demonstrations show how to recover.

    One push of 4 to 14 steps comes first in a share `start` of the demonstrations; after any other step a push of 2 to
    6 steps comes with probability `burst`.
    """

    start: float = 0.5
    burst: float = 0.02

    def draw(self, rng: np.random.Generator, first: bool, gripper: float) -> Iterator[Action]:
        """The actions (7,) of the push that comes now, mostly none; `gripper` stays as it is."""
        if rng.random() >= (self.start if first else self.burst):
            return
        motion = np.concatenate([rng.uniform(-0.8, 0.8, 3), rng.uniform(-0.15, 0.15, 3), [gripper]])
        for _ in range(rng.integers(4, 15) if first else rng.integers(2, 7)):
            yield motion


@dataclass(frozen=True)
class Mistakes:
    """Failed tries that come unrecorded before some demonstrations, so that these show how to try again.

    A share `missed` of the demonstrations begins with the gripper closed on nothing, lifted beside the object, a share
    `misplaced` with the object let go beside its place. Errors are `distance_m` (least, most) in a random direction.
    """

    missed: float = 0.35
    misplaced: float = 0.15
    distance_m: tuple[float, float] = (0.035, 0.07)

    def make(self, environment: LiberoEnvironment, attempt: int, rng: np.random.Generator) -> None:
        """Makes the mistake that comes before this demonstration, or none.

        Raises:
            ExpertFailed: when the try reaches the goal after all, and nothing is left to show.
        """
        kind, angle, distance = rng.random(), rng.uniform(0, 2 * np.pi), rng.uniform(*self.distance_m)
        if kind >= self.missed + self.misplaced:
            return
        error = distance * np.array([np.cos(angle), np.sin(angle)])
        errors = (error, np.zeros(2)) if kind < self.missed else (np.zeros(2), error)
        solved = False
        with contextlib.suppress(ExpertFailed):
            for action in Expert(environment, attempt).mistake(*errors):
                solved |= environment.step(action)
        if solved:
            raise ExpertFailed("the try that was to fail reached the goal")
        if kind < self.missed:
            for action in Pushes(burst=1.0).draw(rng, first=False, gripper=CLOSED):
                environment.step(action)


@dataclass(frozen=True)
class Recording:
    """T steps of an episode: what held before each action, the action, and whether the expert wanted it.

    Attributes:
        qpos: (T, nq) joint positions, from which `LiberoEnvironment.restore` brings the picture back.
        states: (T, 8) as `LiberoEnvironment.state`.
        actions: (T, 7) in the simulator's convention.
        wanted: (T,) False in pushes.
        success_step: number of actions after which the goal held first.
    """

    qpos: NDArray[np.float64]
    states: NDArray[np.float64]
    actions: NDArray[np.float64]
    wanted: NDArray[np.bool_]
    success_step: int


def demonstrate(
    environment: LiberoEnvironment,
    attempt: int,
    rng: np.random.Generator,
    pushes: Pushes | None = None,
    steps_past_success: int = 10,
    mistakes: Mistakes | None = None,
) -> Recording:
    """Runs one attempt of the expert on an environment that was just reset.

    The recording begins after the mistake, if one is made, and goes on for some steps after the goal first holds,
    because letting go comes after that.

    Raises:
        ExpertFailed: when the goal is not reached within the suite's step cap, or so soon that nothing is shown.
    """
    if mistakes is not None:
        mistakes.make(environment, attempt, rng)
    recorder = Recorder(environment)
    cap = step_cap(environment.task.suite)
    for action, wanted in _disturbed(Expert(environment, attempt), rng, pushes):
        recorder.step(action, wanted)
        if recorder.success_step is not None and recorder.steps >= recorder.success_step + steps_past_success:
            break
        if recorder.success_step is None and recorder.steps >= cap:
            raise ExpertFailed(f"the goal was not reached in {cap} steps")
    gripper = recorder.actions[-1][6] if recorder.actions else OPEN
    waiting = 0
    while (
        waiting < steps_past_success
        if recorder.success_step is None
        else recorder.steps < recorder.success_step + steps_past_success
    ):
        recorder.step(np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper]), wanted=True)
        waiting += 1
    recording = recorder.finish()
    if not segments(recording.wanted):
        raise ExpertFailed(f"the goal held at step {recording.success_step}, before {MIN_SEGMENT} steps without a push")
    return recording


def _disturbed(expert: Expert, rng: np.random.Generator, pushes: Pushes | None) -> Iterator[tuple[Action, bool]]:
    """The expert's actions with pushes between them; the expert looks anew after each push."""
    if pushes is not None:
        for motion in pushes.draw(rng, first=True, gripper=OPEN):
            yield motion, False
    for action in expert.actions():
        yield action, True
        if pushes is not None:
            for motion in pushes.draw(rng, first=False, gripper=action[6]):
                yield motion, False


class Recorder:
    """Executes actions and keeps what held before each of them."""

    def __init__(self, environment: LiberoEnvironment) -> None:
        self._environment = environment
        self._qpos: list[NDArray[np.float64]] = []
        self._states: list[NDArray[np.float64]] = []
        self._wanted: list[bool] = []
        self.actions: list[Action] = []
        self.success_step: int | None = None

    @property
    def steps(self) -> int:
        return len(self.actions)

    def step(self, action: Action, wanted: bool) -> bool:
        """Executes an action; says whether the goal holds now."""
        self._qpos.append(self._environment.data.qpos.copy())
        self._states.append(self._environment.state())
        self._wanted.append(wanted)
        self.actions.append(action)
        holds = self._environment.step(action)
        if holds and self.success_step is None:
            self.success_step = self.steps
        return holds

    def finish(self) -> Recording:
        if self.success_step is None:
            raise ExpertFailed("the goal did not hold at the end of the script")
        return Recording(
            qpos=np.stack(self._qpos),
            states=np.stack(self._states),
            actions=np.stack(self.actions),
            wanted=np.array(self._wanted),
            success_step=self.success_step,
        )


def segments(wanted: NDArray[np.bool_], shortest: int = MIN_SEGMENT) -> list[slice]:
    """The longest runs of wanted steps (T,), in order, without those shorter than `shortest`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wanted.astype(np.int8), [0]])))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= shortest]
