"""The simulator as a robot: driven step by step by a chunk runner, as one would drive a real one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from experiments.robot.libero.simulator.environment import CAMERAS, LiberoEnvironment
from prismatic.serving.executed import Action, Hold
from prismatic.serving.runner import ChunkRunner


class Sight(Mapping[str, NDArray[Any]]):
    """What the robot observes now: pictures are drawn when they are looked at, which most control steps do not.

    Valid until the environment's next step.
    """

    def __init__(self, environment: LiberoEnvironment, cameras: Sequence[str] = tuple(CAMERAS)) -> None:
        self._environment, self._cameras = environment, tuple(cameras)

    def __getitem__(self, key: str) -> NDArray[Any]:
        if key == "state":
            return self._environment.state()
        if key not in self._cameras:
            raise KeyError(key)
        return self._environment.frame(key)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._cameras, "state"))

    def __len__(self) -> int:
        return len(self._cameras) + 1


@dataclass(frozen=True)
class Driven:
    """How an episode went.

    Attributes:
        success: whether the goal was reached.
        steps: control steps that it took, holds included.
        actions: how many of them executed an action of the policy.
        actions_sha256: of those actions.
    """

    success: bool
    steps: int
    actions: int
    actions_sha256: str


def drive(
    environment: LiberoEnvironment,
    runner: ChunkRunner,
    max_steps: int,
    cameras: Sequence[str] = tuple(CAMERAS),
    on_step: Callable[[int, Action | Hold], None] | None = None,
    period_s: float = 0.0,
) -> Driven:
    """Drive until the goal holds or the control steps are used up. The environment was reset, the runner has begun.

    Args:
        environment: the robot.
        runner: says what it is sent.
        max_steps: control steps.
        cameras: observation keys of the pictures that the policy reads.
        on_step: called after each control step with its number, from 0, and what was sent.
        period_s: how long a control step lasts on the wall, at least; 0: the simulation runs as fast as it can.
    """
    actions, success, digest, step = 0, False, hashlib.sha256(), 0
    for step in range(max_steps):
        began = time.monotonic()
        command = runner.step(Sight(environment, cameras))
        success = environment.step_policy(command.values)
        if isinstance(command, Action):
            actions += 1
            digest.update(command.values.tobytes())
        if on_step is not None:
            on_step(step, command)
        if success:
            break
        time.sleep(max(0.0, began + period_s - time.monotonic()))
    return Driven(success, step + 1 if max_steps else 0, actions, digest.hexdigest())
