"""A robot and a policy of whom it is known what must be executed when, in time that tests count.

The robot's state is the number of actions that it has executed. The policy foresees: action i of a chunk says in its
first dimension the state in which it has to be executed, and in its second when its observation was taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismatic.serving.asking import InSimulatedTime
from prismatic.serving.executed import Action, Hold
from prismatic.serving.runner import ChunkRunner, RunnerSettings
from prismatic.vla.robots import LIBERO, Control

ROBOT = dataclasses.replace(LIBERO, control=Control("delta", grippers=(6,), gripper_at_rest=0.5))
"""LIBERO's, without limits: the policy's numbers are no motions."""
TICK_S = 1 / ROBOT.control_rate_hz


class Policy:
    """Answers with what is due, or raises what `trouble` returns."""

    def __init__(self) -> None:
        self.asked = 0
        self.trouble: Callable[[], Exception | None] = lambda: None

    def act(self, observation: Mapping[str, Any], instruction: str) -> NDArray[np.float64]:
        self.asked += 1
        if (error := self.trouble()) is not None:
            raise error
        actions = np.zeros((ROBOT.chunk_length, ROBOT.action_dim))
        actions[:, 0] = observation["state"][0] + np.arange(ROBOT.chunk_length)
        actions[:, 1] = observation["state"][1]
        actions[:, 6] = self.asked % 2
        return actions


class World:
    """The robot, its policy and a runner between them. `latency_s` may be changed on the way."""

    def __init__(self, settings: RunnerSettings | None = None, latency_s: float = 0.0) -> None:
        self.time, self.executed, self.latency_s = 100.0, 0, latency_s
        self.policy = Policy()
        asker = InSimulatedTime(self.policy, lambda: self.latency_s, self.clock)
        self.runner = ChunkRunner(asker, ROBOT, settings, clock=self.clock)
        self.runner.begin("count")

    def clock(self) -> float:
        return self.time

    def tick(self, blind_s: float = 0.0) -> Action | Hold:
        """One control step; what is executed has to be what was foreseen for it."""
        command = self.runner.step({"state": np.array([self.executed, self.time])})
        if isinstance(command, Action):
            assert abs(command.values[0] - self.executed) < 1e-9, "an action of another control step was executed"
            seen_at = command.values[1]
            assert self.time - seen_at <= self.runner.max_age_s + 1e-9, "a stale action was executed"
            if len(command.sources) == 1:  # of an ensemble the second dimension is a mean, and the age the oldest's
                np.testing.assert_allclose(command.age_s, self.time - seen_at, atol=1e-9)
            self.executed += 1
        else:
            assert not command.values[:6].any(), "a hold moved the robot"
        self.time += TICK_S + blind_s
        return command

    def ticks(self, number: int) -> str:
        """So many control steps: `A` for an action, `.` for a hold, `!` for one until the robot is re-armed."""
        words = []
        for _ in range(number):
            command = self.tick()
            words.append("A" if isinstance(command, Action) else "!" if command.needs_rearm else ".")
        return "".join(words)
