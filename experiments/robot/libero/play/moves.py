"""Objects moved by hand to other starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.scene import Scene
from experiments.robot.libero.simulator.tasks import LiberoTask
from experiments.robot.libero.simulator.wide_starts import is_free

FARTHEST_M = 0.3


@dataclass(frozen=True)
class Moves:
    """Moves objects by chosen distances; a `Mover`.

    Attributes:
        offsets: object -> metres along x and y from its place in the initial state.
    """

    offsets: Mapping[str, tuple[float, float]]

    def apply(self, scene: Scene, task: LiberoTask, state: NDArray[np.float64]) -> None:
        """Raises ValueError for what cannot be moved, and for places that are taken or out of the arm's reach."""
        movable = movable_objects(scene)
        for name, offset in self.offsets.items():
            if name not in movable:
                raise ValueError(f"{name!r} cannot be moved; this scene has {', '.join(movable)}")
            if not np.abs(offset).max() <= FARTHEST_M:
                raise ValueError(f"{name} is moved by {tuple(offset)} m; expected at most {FARTHEST_M} each way")
            scene.shift(name, offset)
        for name, offset in self.offsets.items():
            if any(offset) and not is_free(scene, name):
                raise ValueError(f"{name} cannot stand there: it touches something, or the arm does not reach it")


def movable_objects(scene: Scene) -> list[str]:
    """What stands on the table itself and is no fixture."""
    return [name for name in scene.names if scene.is_movable(name) and scene.rests_on_workspace(name)]
