"""Wide starts: the objects that a goal names, moved anywhere free around their standard places.

LIBERO's own initial states differ by one to four centimetres, so little that a policy can succeed without looking. A
wide start draws a new place uniformly from a square around each object's place in the initial state. It is a pure
function of (seed, split, task, initial state, trial), so collection and evaluation draw different starts from the same
initial states by naming different splits, and any episode can be repeated.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.scene import Scene
from experiments.robot.libero.simulator.tasks import LiberoTask

MOVED = ("goal", "manipulated")

_DRAWS = 500
_OBJECT_CLEARANCE_M = 0.005
_FIXTURE_CLEARANCE_M = 0.02
_REACH_M = (0.30, 0.80)
"""Distances from the robot's base within which the arm reaches the table with the gripper pointing down."""


class Mover(Protocol):
    """Moves objects of a scene away from where an initial state has them, before they settle."""

    def apply(self, scene: Scene, task: LiberoTask, state: NDArray[np.float64]) -> Any:
        """Moves them in a scene that was just put into `state` (S,)."""
        ...


@dataclass(frozen=True)
class Displacement:
    """Moves objects of the goal by up to `radius_m` along x and along y, independently and uniformly, to a free place.

    Attributes:
        radius_m: half side of the square.
        seed, split, trial: what distinguishes one draw from another, beside the task and its initial state.
        moved: `goal` moves every movable thing that the goal names; `manipulated` only what is to be picked up. Things
            that do not start on the table or floor itself (a bowl on a stove) stay where they are.
    """

    radius_m: float = 0.06
    seed: int = 0
    split: str = "train"
    trial: int = 0
    moved: str = "goal"

    def __post_init__(self) -> None:
        if not 0.0 < self.radius_m <= 0.3:
            raise ValueError(f"the displacement is {self.radius_m} m; expected more than 0 and at most 0.3")
        if self.moved not in MOVED:
            raise ValueError(f"unknown choice of displaced objects {self.moved!r}; known: {', '.join(MOVED)}")

    def generator(self, task: LiberoTask, state: NDArray[np.float64]) -> np.random.Generator:
        """The random numbers of one start; `state` (S,) is the initial state."""
        words = (self.split.encode(), f"{task.suite}/{task.name}".encode(), np.ascontiguousarray(state).tobytes())
        return np.random.default_rng([self.seed, self.trial, *(zlib.crc32(word) for word in words)])

    def apply(self, scene: Scene, task: LiberoTask, state: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Moves the objects of a task's scene that was just put into `state`; returns each one's offset (2,) in metres.

        Places are drawn for all objects at once until they are free together; after 500 vain draws nothing moves.
        """
        rng = self.generator(task, state)
        names = self.objects(task, scene)
        for _ in range(_DRAWS):
            offsets = {name: rng.uniform(-self.radius_m, self.radius_m, size=2) for name in names}
            for name, offset in offsets.items():
                scene.shift(name, offset)
            if all(is_free(scene, name) for name in names):
                return offsets
            for name, offset in offsets.items():
                scene.shift(name, -offset)
        return {name: np.zeros(2) for name in names}

    def objects(self, task: LiberoTask, scene: Scene) -> list[str]:
        """Names of the objects that move, in the goal's order."""
        mentioned: list[str] = []
        for predicate in task.goal:
            places = predicate[1:] if self.moved == "goal" else predicate[1:2]
            mentioned += [owner for place in places if (owner := scene.owner(place)) is not None]
        return [name for name in dict.fromkeys(mentioned) if scene.is_movable(name) and scene.rests_on_workspace(name)]


def is_free(scene: Scene, name: str) -> bool:
    """Whether the arm reaches a thing and everything else keeps its distance from it."""
    reach = np.linalg.norm(scene.position(name)[:2] - scene.base_position[:2])
    if not _REACH_M[0] <= reach <= _REACH_M[1]:
        return False
    return all(
        scene.gap(name, other, limit=2 * clearance) > clearance
        for other in scene.names
        if other != name
        for clearance in (_OBJECT_CLEARANCE_M if scene.is_movable(other) else _FIXTURE_CLEARANCE_M,)
    )
