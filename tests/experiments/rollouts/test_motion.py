"""Jerk, against derivatives that are known; progress and jerk of rollouts in the real simulator."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from experiments.robot.libero.policies.contract import ActionChunk, Observation, PolicyQuery
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.motion import rms_jerk
from experiments.robot.libero.rollouts.rollout import Moment, RolloutSettings, run_episode
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.vla.robots import LIBERO

STOVE_AND_POT = 2  # of libero_10: the goal is that the stove is on, and that the moka pot stands on it


def test_a_cubic_path_has_the_jerk_of_its_third_derivative() -> None:
    """p(t) = (a t^3, b t^3 + t^2, 5): jerk (6 a, 6 b, 0) everywhere, and finite differences of cubics are exact."""
    time = np.arange(30) / 20.0
    path = np.stack([0.5 * time**3, -2 * time**3 + time**2, np.full(30, 5.0)], axis=1)
    assert rms_jerk(path, 20.0) == pytest.approx(6 * np.hypot(0.5, 2.0), rel=1e-6)


def test_a_fast_sine_has_the_root_mean_square_of_its_derivative() -> None:
    """x = A sin(w t): RMS of A w^3 cos(w t) is A w^3 / sqrt 2; sampled finely enough, differences come close."""
    time = np.arange(20_001) / 2000.0
    path = np.stack([0.1 * np.sin(6 * time), 0 * time, 0 * time], axis=1)
    assert rms_jerk(path, 2000.0) == pytest.approx(0.1 * 6**3 / np.sqrt(2), rel=0.01)


def test_straight_and_uniform_is_smooth_and_three_steps_have_no_jerk() -> None:
    assert rms_jerk(np.arange(24.0).reshape(8, 3), 20.0) == pytest.approx(0, abs=1e-6)
    assert rms_jerk(np.zeros((3, 3)), 20.0) is None and rms_jerk(np.zeros((4, 3)), 20.0) == 0.0


class Path:
    """Where the end effector was after each step, by the state that policies are shown."""

    def __init__(self, environment: LiberoEnvironment) -> None:
        self.environment = environment
        self.positions: list[NDArray[np.float64]] = []

    def on_query(self, moment: Moment, observation: Observation, chunk: ActionChunk) -> None:
        if not self.positions:
            self.positions.append(observation["state"][:3])

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        self.positions.append(self.environment.state()[:3])

    def finish(self, moment: Moment, record: EpisodeRecord) -> None: ...


class Wiggles:
    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        rng = np.random.default_rng(queries[0].seed)
        return [ActionChunk(rng.uniform(-0.5, 0.5, (8, 7)))]


def roll(environment: LiberoEnvironment, state: Any, observers: Sequence[Any] = ()) -> EpisodeRecord:
    task = environment.task
    start = Start(task=task, instruction=task.language, initial_state=0, trial=0, seed=7, state=state)
    return run_episode(environment, Wiggles(), start, RolloutSettings(max_steps=12), observers)


def test_rollouts_say_how_they_moved_and_how_far_they_came() -> None:
    """With the stove switched on from the beginning, half of the goal holds; with the usual state, nothing does."""
    task = load_task("libero_10", STOVE_AND_POT)
    assert [predicate[0] for predicate in task.goal] == ["turnon", "on"]
    with LiberoEnvironment(task, resolution=64, renderer="fast", settle_steps=2) as environment:
        assert environment.control_rate_hz == LIBERO.control_rate_hz == 20.0
        path = Path(environment)
        usual = roll(environment, task.init_states[0], [path])
        lit = task.init_states[0].copy()
        knob = environment.model.joint("flat_stove_1_button").id
        lit[1 + environment.model.jnt_qposadr[knob]] = 1.0  # LIBERO takes the stove for on from 0.5 to 2.1
        half = roll(environment, lit)
    assert usual.invalid is None and half.invalid is None
    assert (usual.progress, half.progress) == (0.0, 0.5) and half.success is False
    points, step = np.array(path.positions), 1 / 20.0
    assert len(points) == 13
    squares = []
    for k in range(10):
        third = [points[k + 3, i] - 3 * points[k + 2, i] + 3 * points[k + 1, i] - points[k, i] for i in range(3)]
        squares.append(sum((value / step**3) ** 2 for value in third))
    assert usual.jerk == pytest.approx(float(np.sqrt(np.mean(squares))), abs=6e-4) and usual.jerk > 1
