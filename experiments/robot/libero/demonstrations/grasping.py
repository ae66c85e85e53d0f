"""Where a parallel gripper that points straight down can hold an object, from the object's visible shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.scene import COLLISION, VISUAL, Points, Scene

REST_YAW = np.pi / 2
"""The gripper's yaw at the start of an episode, about the middle of the last joint's range."""

_YAWS = np.arange(0.0, np.pi, np.pi / 24)
_WIDEST_M = 0.074
_FINGER_M = 0.03
_RIM_ANGLES = np.pi * np.array([1 / 2, -1 / 2, 1 / 4, 3 / 4, -1 / 4, -3 / 4, 0.0, 1.0])


@dataclass(frozen=True)
class Grasp:
    """Fingertips at `position` (3,) in metres, closing along the horizontal direction `yaw` in radians."""

    position: Points
    yaw: float


def nearest_yaw(yaw: float) -> float:
    """The same closing direction (it repeats every half turn) with the yaw closest to rest."""
    return min((yaw - np.pi, yaw, yaw + np.pi), key=lambda candidate: abs(candidate - REST_YAW))


def pointing_down(yaw: float) -> NDArray[np.float64]:
    """Orientation (3, 3) of a gripper that points down and closes along `yaw`."""
    closing, down = np.array([np.cos(yaw), np.sin(yaw), 0.0]), np.array([0.0, 0.0, -1.0])
    return np.stack([closing, np.cross(down, closing), down], axis=1)


def narrowest_yaw(points: Points, reluctance_m: float = 0.0) -> tuple[float, float]:
    """Direction in which points (P, 2+) are narrowest, as (yaw, width in metres).

    Args:
        points: only x and y count.
        reluctance_m: width added per radian of turning away from rest, to prefer small turns.
    """

    def cost(yaw: float) -> float:
        return _extent(points, yaw)[1] + reluctance_m * abs(nearest_yaw(yaw) - REST_YAW)

    yaw = min(_YAWS, key=cost)
    return float(yaw), cost(yaw)


def grasps(scene: Scene, name: str) -> list[Grasp]:
    """Ways to hold an object, best first: around its body where that is narrow, else over its rim; may be empty."""
    points = scene.points(name, VISUAL)
    if not len(points):
        points = scene.points(name, COLLISION)
    around = list(_around_body(points))
    return around or list(_over_rim(points))


def _around_body(points: Points) -> Iterator[Grasp]:
    bottom, top = points[:, 2].min(), points[:, 2].max()
    preferred = max(bottom + 0.012, top - _FINGER_M)
    for offset in (0.0, -0.015, 0.01):
        height = max(bottom + 0.008, preferred + offset)
        slab = points[np.abs(points[:, 2] - height) < 0.015]
        if len(slab) < 8:
            slab = points
        yaw, width = narrowest_yaw(slab, reluctance_m=0.01)
        if width >= _WIDEST_M:
            continue
        across, along = _direction(yaw), _direction(yaw + np.pi / 2)
        middle, length = _extent(slab, yaw + np.pi / 2)
        center = across * _extent(slab, yaw)[0] + along * middle
        yield Grasp(np.append(center, height), yaw)
        spare = length / 2 - _FINGER_M / 2
        if offset == 0.0 and spare > 0.012:
            for side in (-spare, spare):
                yield Grasp(np.append(center + side * along, height), yaw)


def _over_rim(points: Points) -> Iterator[Grasp]:
    bottom, top = points[:, 2].min(), points[:, 2].max()
    rim = points[points[:, 2] > top - 0.012][:, :2]
    center = (rim.max(axis=0) + rim.min(axis=0)) / 2
    angles = np.arctan2(*(rim - center).T[::-1])
    for depth in (0.02, 0.03):
        for angle in _RIM_ANGLES:
            here = np.abs((angles - angle + np.pi) % (2 * np.pi) - np.pi) < 0.15
            if here.any():
                radius = np.linalg.norm(rim[here] - center, axis=1).max() - 0.006
                height = max(top - depth, bottom + 0.01)
                yield Grasp(np.append(center + radius * _direction(angle), height), float(angle))


def _direction(yaw: float) -> Points:
    return np.array([np.cos(yaw), np.sin(yaw)])


def _extent(points: Points, yaw: float) -> tuple[float, float]:
    """Middle and length of points' shadow along a direction, metres."""
    shadow = points[:, :2] @ _direction(yaw)
    return float(shadow.max() + shadow.min()) / 2, float(np.ptp(shadow))
