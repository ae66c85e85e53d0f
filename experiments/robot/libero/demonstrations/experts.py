"""Scripted experts that solve LIBERO tasks through the ordinary 7-dimensional actions, knowing the simulator's state.

An expert reads the task's own goal and nothing else about the task: things to be `on` or `in` something are picked up
and placed, things to be turned on have their knob turned. It is a generator of actions: whoever drives it applies each
action before asking for the next, and may disturb the robot in between, for every action is computed from the current
state.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments.robot.libero.demonstrations.grasping import Grasp, grasps, narrowest_yaw, nearest_yaw, pointing_down
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.scene import Points, Scene
from experiments.robot.libero.simulator.tasks import Predicate

ATTEMPTS = 6
"""Different ways of doing it (grasps, heights) that are worth trying on one start."""
OPEN, CLOSED = -1.0, 1.0

Action = NDArray[np.float64]

_FULL_SPEED_ERROR_M = 0.025
"""An error of the position beyond this is answered with a full action."""
_NEIGHBOURHOOD_M = 0.2
_EXACT = np.zeros(2)


class ExpertFailed(RuntimeError):
    """The expert noticed that it cannot go on; the message says why."""


def rotation_vector(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axis times angle (3,), in radians, of a rotation matrix (3, 3)."""
    angle = np.arccos(np.clip((np.trace(rotation) - 1.0) / 2.0, -1.0, 1.0))
    if angle < 1e-6:
        return np.zeros(3)
    skew = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    return skew * (angle / (2.0 * np.sin(angle) + 1e-9))


class Expert:
    """One attempt at the environment's task; `attempt` counts from 0 and selects among the possible grasps."""

    def __init__(self, environment: LiberoEnvironment, attempt: int = 0) -> None:
        self._environment, self._attempt = environment, attempt
        self._scene = Scene(environment.inner)
        self._rotation = self._scene.grip_rotation
        self._gripper = OPEN

    def actions(self) -> Iterator[Action]:
        """Yields actions (7,) until the script is over; what is still missing then is a failure.

        Raises:
            ExpertFailed: when it is clear that the attempt fails, or that no expert exists for a goal.
        """
        for predicate in self._environment.task.goal:
            yield from self._solve(predicate)

    def mistake(self, grasp_error: Points, place_error: Points) -> Iterator[Action]:
        """Yields the actions of one try that goes wrong, at the first thing that the goal wants put somewhere.

        Args:
            grasp_error: (2,) metres by which the fingers miss; the try ends where the expert notices.
            place_error: (2,) metres by which the thing is put beside its place.

        Raises:
            ExpertFailed: as `actions`; above all when the grasp misses.
        """
        for kind, *names in self._environment.task.goal:
            if kind in ("on", "in"):
                yield from self._pick_and_place(names[0], names[1], kind == "in", grasp_error, place_error)
                return

    def _solve(self, predicate: Predicate) -> Iterator[Action]:
        kind, *names = predicate
        if kind in ("on", "in"):
            return self._pick_and_place(names[0], names[1], drop=kind == "in")
        if kind == "turnon":
            return self._turn_on(names[0])
        raise ExpertFailed(f"no expert for the goal {' '.join(predicate)!r}")

    # Motions

    def _action(self, velocity: ArrayLike, turn_limit: float = 0.5) -> Action:
        turn = np.clip(self._turn() / 0.5, -turn_limit, turn_limit)
        return np.clip(np.concatenate([np.asarray(velocity), turn, [self._gripper]]), -1.0, 1.0)

    def _turn(self) -> NDArray[np.float64]:
        return rotation_vector(self._rotation @ self._scene.grip_rotation.T)

    def _reach(self, target: Points, tolerance: float = 0.008, steps: int = 60, speed: float = 1.0) -> Iterator[Action]:
        """Moves the fingertips to `target` (3,) and turns them to the wanted orientation; ends there, or when stuck."""
        still = 0
        for _ in range(steps):
            before = self._scene.grip_position
            error, turned = target - before, np.linalg.norm(self._turn())
            if np.linalg.norm(error) < tolerance and turned < 0.08:
                return
            velocity = error / _FULL_SPEED_ERROR_M
            yield self._action(velocity * min(1.0, speed / max(np.abs(velocity).max(), 1e-9)))
            moved = np.linalg.norm(self._scene.grip_position - before)
            still = still + 1 if moved < 4e-4 and np.linalg.norm(self._turn()) < 0.15 else 0
            if still > 6:
                return

    def _hold(self, gripper: float, steps: int) -> Iterator[Action]:
        self._gripper = gripper
        for _ in range(steps):
            yield np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper])

    # Picking up and placing

    def _pick_and_place(
        self, name: str, place: str, drop: bool, grasp_error: Points = _EXACT, place_error: Points = _EXACT
    ) -> Iterator[Action]:
        """`drop` lets go above the rim of a container instead of on its floor; errors (2,) in metres."""
        candidates = grasps(self._scene, name)
        if not candidates:
            raise ExpertFailed(f"found no way to hold {name}")
        grasp = candidates[self._attempt % len(candidates)]
        grasp = Grasp(grasp.position + np.append(grasp_error, 0.0), grasp.yaw)
        surface = self._surface(place)
        surface = replace(surface, center=surface.center + place_error)
        lift = yield from self._pick(name, grasp, surface)
        yield from self._place(name, surface, lift, drop)

    def _pick(self, name: str, grasp: Grasp, surface: _Surface) -> Generator[Action, None, float]:
        """Yields actions until the object hangs above everything near; returns the fingertips' height."""
        scene, (x, y, height) = self._scene, grasp.position
        above = self._safe_height(name, grasp)
        self._gripper, self._rotation = OPEN, pointing_down(nearest_yaw(grasp.yaw))
        yield from self._reach(np.array([x, y, above]), tolerance=0.015)
        yield from self._reach(np.array([x, y, height + 0.03]), steps=40)
        yield from self._reach(grasp.position, tolerance=0.005, steps=25, speed=0.4)
        yield from self._hold(CLOSED, 10)
        start = scene.position(name)[2]
        hangs = height - scene.points(name)[:, 2].min()
        lift = max(above, surface.top + 0.08 + hangs, height + 0.12)
        yield from self._reach(np.array([x, y, lift]), tolerance=0.02)
        if scene.position(name)[2] < start + 0.04:
            raise ExpertFailed(f"the grasp of {name} did not hold")
        return lift

    def _place(self, name: str, surface: _Surface, lift: float, drop: bool) -> Iterator[Action]:
        scene = self._scene
        hangs = scene.grip_position[2] - scene.points(name)[:, 2].min()
        yield from self._reach(np.append(self._above(name, surface), lift), tolerance=0.012, steps=90)
        low = surface.height + 0.012
        if drop:
            low = max(low, surface.top - 0.05)
        yield from self._reach(np.append(self._above(name, surface), low + hangs), tolerance=0.006, steps=50, speed=0.5)
        yield from self._hold(OPEN, 8)
        yield from self._reach(scene.grip_position + [0.0, 0.0, 0.12], tolerance=0.02, steps=30)

    def _above(self, name: str, surface: _Surface) -> Points:
        """Where the fingertips (2,) must be for the held object's origin (LIBERO judges by it) to be in the middle."""
        return surface.center - (self._scene.position(name)[:2] - self._scene.grip_position[:2])

    def _surface(self, place: str) -> _Surface:
        scene = self._scene
        center, owner = scene.place_center(place), scene.owner(place)
        height = scene.surface_below(center, scene.grip_position[2] + 0.5)
        points = scene.points(owner) if owner else np.zeros((0, 3))
        near = points[np.linalg.norm(points[:, :2] - center, axis=1) < 0.16]
        return _Surface(center, height, near[:, 2].max() if len(near) else height)

    def _safe_height(self, name: str, grasp: Grasp) -> float:
        """Fingertip height that clears what stands around the object, within what the arm does comfortably."""
        scene, height = self._scene, grasp.position[2]
        tops = [
            points[:, 2].max()
            for other in scene.names
            if len(points := scene.points(other))
            and (other == name or np.linalg.norm(scene.position(other)[:2] - grasp.position[:2]) < _NEIGHBOURHOOD_M)
        ]
        return max(height + 0.1, min(max(tops) + 0.06, height + 0.25))

    # Turning on

    def _turn_on(self, fixture: str) -> Iterator[Action]:
        knob = _Knob.of(self._scene, fixture)
        top = knob.points[:, 2].max()
        bar = knob.points[knob.points[:, 2] > top - 0.012]
        x, y = (bar[:, :2].max(axis=0) + bar[:, :2].min(axis=0)) / 2
        yaw = nearest_yaw(narrowest_yaw(bar)[0])
        grip = np.array([x, y, top - (0.015, 0.022, 0.008)[self._attempt % 3]])
        self._gripper, self._rotation = OPEN, pointing_down(yaw)
        yield from self._reach(np.array([x, y, top + 0.1]), tolerance=0.012)
        yield from self._reach(grip, tolerance=0.006, steps=50, speed=0.5)
        yield from self._hold(CLOSED, 10)
        for step in range(1, 61):
            self._rotation = pointing_down(yaw + knob.direction * 0.05 * step)
            pull = np.clip((grip - self._scene.grip_position) / _FULL_SPEED_ERROR_M, -0.4, 0.4)
            yield self._action(pull, turn_limit=0.6)


@dataclass(frozen=True)
class _Surface:
    """Where to place: horizontal `center` (2,), `height` there, and `top` of what surrounds it (a rim), in metres."""

    center: Points
    height: float
    top: float


@dataclass(frozen=True)
class _Knob:
    """A knob's shape (P, 3) and the sense, +1 or -1 about the vertical, in which turning switches it on."""

    points: Points = field(repr=False)
    direction: float

    @classmethod
    def of(cls, scene: Scene, fixture: str) -> _Knob:
        thing = scene.inner.get_object(fixture)
        joint = scene.model.joint(thing.joints[-1]).id
        wanted = np.mean(thing.object_properties["articulation"]["default_turnon_ranges"])
        missing = wanted - scene.data.qpos[scene.model.jnt_qposadr[joint]]
        points = scene.body_points([int(scene.model.jnt_bodyid[joint])])
        return cls(points, float(np.sign(missing * scene.data.xaxis[joint][2])))
