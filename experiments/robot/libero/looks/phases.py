"""In which phase of its task an episode is, and where it put what it carried, from the simulator's truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.looks.classes import Aim, aims_of
from experiments.robot.libero.rollouts.rollout import Moment
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.scene import Scene

PHASES = ("reach", "grasp", "carry", "place")
REACH, GRASP, CARRY, PLACE = range(len(PHASES))

LIFTED_M = 0.02
"""A held object is carried from this height above where it stood when the episode began."""
AT_GOAL_M = 0.06
"""So near to the middle of its goal, horizontally, it is placed."""
NEAR_M = 0.03
"""Fingers that are told to close at something no farther than this grasp it."""
JUST_RELEASED_STEPS = 10
"""For so many control steps (half a second) what was let go at the goal is still being placed."""


@dataclass(frozen=True)
class Carried:
    """How far an episode came with one object that its goal moves.

    Attributes:
        held: whether it was held at any moment.
        at_end: whether it still was when the episode ended.
        apart: (x, y) metres from the middle of its goal to where it was held last after having been lifted: x away from
            the robot, y to its left. None where it was never lifted.
    """

    held: bool
    at_end: bool
    apart: tuple[float, float] | None

    @property
    def distance(self) -> float:
        """Of `apart`, metres; infinite without one."""
        return float("inf") if self.apart is None else float(np.hypot(*self.apart))


@dataclass
class _Followed:
    """An aim, how high its target stood, when it was last held, and whether it has been lifted since it was grasped.

    `apart` is `Carried`'s.
    """

    aim: Aim
    height: float
    held_at: int | None = None
    lifted: bool = False
    apart: tuple[float, float] | None = None


class Phases:
    """Follows one episode; `step` it after every control step, and ask `now` at any.

    reach: the target is not grasped yet, or not any more.
    grasp: the target is held and less than `LIFTED_M` above its first height, or the fingers, told to close, are within
        `NEAR_M` of it.
    carry: it is held and lifted.
    place: it has been lifted, and is held (also when set down) within `AT_GOAL_M` of its goal, horizontally; or it was
        let go there no longer than `JUST_RELEASED_STEPS` ago.

    An object is held while both fingers touch it; a part of a fixture (drawer, knob) while any finger does, and is
    neither carried nor placed. Of a goal with several predicates the one counts whose target is held, else the first
    that does not hold yet.
    """

    def __init__(self, environment: LiberoEnvironment) -> None:
        """Of an episode that has settled and not begun."""
        self._environment = environment
        self._scene = Scene(environment.inner)
        aims = aims_of(self._scene, environment.task.goal)
        self._followed = [_Followed(aim, self._position(aim)[2]) for aim in aims]
        geoms = environment.inner.robots[0].gripper.important_geoms
        self._fingers = [
            [environment.model.geom(name).id for name in geoms[f"{side}_finger"]] for side in ("left", "right")
        ]
        self._closing = False

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        """An action (7,) of the policy's convention has led to the moment."""
        self._closing = bool(action[6] < 0.5)
        for each in self._followed:
            if self.holds(each.aim):
                each.held_at = moment.step
                each.lifted |= self._is_up(each)
                if each.lifted and each.aim.place is not None:
                    x, y = self._apart(each.aim, each.aim.place)
                    each.apart = float(x), float(y)
            elif each.held_at is None or moment.step - each.held_at > JUST_RELEASED_STEPS:
                each.lifted = False

    def holds(self, aim: Aim) -> bool:
        """Whether the gripper holds the aim's target now."""
        data, model = self._environment.data, self._environment.model
        pairs = data.contact.geom[: data.ncon]
        if not len(pairs):
            return False
        on_target = np.isin(model.geom_bodyid[pairs], aim.target)
        touched = [bool((np.isin(pairs, finger) & on_target[:, ::-1]).any()) for finger in self._fingers]
        return all(touched) if aim.place is not None else any(touched)

    def now(self, step: int) -> int:
        """The phase after `step` control steps, an index into `PHASES`."""
        each = self._current()
        held = self.holds(each.aim)
        recently = each.held_at is not None and step - each.held_at <= JUST_RELEASED_STEPS
        if (held or recently) and each.lifted and self._at_goal(each.aim):
            return PLACE
        if held:
            return CARRY if each.aim.place is not None and self._is_up(each) else GRASP
        return GRASP if self._closing and self._gap(each.aim.target) <= NEAR_M else REACH

    def carried(self) -> list[Carried | None]:
        """Per predicate of the goal, up to now; None for a part of a fixture, which nothing carries."""
        return [
            Carried(each.held_at is not None, self.holds(each.aim), each.apart) if each.aim.place is not None else None
            for each in self._followed
        ]

    def _current(self) -> _Followed:
        if len(self._followed) == 1:
            return self._followed[0]
        held = [each for each in self._followed if self.holds(each.aim)]
        left = [each for each in self._followed if not self._environment.succeeded([each.aim.predicate])]
        return (held or left or self._followed)[0]

    def _is_up(self, each: _Followed) -> bool:
        return bool(self._position(each.aim)[2] - each.height >= LIFTED_M)

    def _position(self, aim: Aim) -> NDArray[np.float64]:
        return np.asarray(self._environment.data.xpos[aim.target[0]])

    def _at_goal(self, aim: Aim) -> bool:
        if aim.place is None:
            return False
        return bool(np.linalg.norm(self._apart(aim, aim.place)) <= AT_GOAL_M)

    def _apart(self, aim: Aim, place: str) -> NDArray[np.float64]:
        return self._position(aim)[:2] - self._scene.place_center(place)

    def _gap(self, bodies: Sequence[int]) -> float:
        """From the point between the fingertips to the nearest point of some bodies, in metres."""
        points = self._scene.body_points(list(bodies))
        return float(np.linalg.norm(points - self._scene.grip_position, axis=1).min()) if len(points) else np.inf
