"""What each body of a scene is to its task, from the goal of the task's description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.scene import Scene
from experiments.robot.libero.simulator.tasks import Predicate

CLASSES = ("target", "goal", "gripper", "arm", "distractors", "background")
TARGET, GOAL, GRIPPER, ARM, DISTRACTORS, BACKGROUND = range(len(CLASSES))


@dataclass(frozen=True)
class Aim:
    """One predicate of a goal.

    Attributes:
        predicate: as the description has it.
        target: bodies of what it moves: an object, or the part of a fixture that a joint moves (a drawer, a knob).
        goal: bodies of where that goes: another object, a fixture, or the owner of a region; of a fixture's own part
            the rest of the fixture. Empty where it is a region of the table or floor.
        place: name of where it goes; None where nothing is carried.
        target_name, goal_name: for people.
    """

    predicate: Predicate
    target: tuple[int, ...]
    goal: tuple[int, ...]
    place: str | None
    target_name: str
    goal_name: str


def aims_of(scene: Scene, goal: Sequence[Predicate]) -> list[Aim]:
    """The aims of a task in its scene, predicate by predicate."""
    return [_carried(scene, each) if len(each) > 2 else _moved(scene, each) for each in goal]


def _carried(scene: Scene, predicate: Predicate) -> Aim:
    """`on` and `in`: an object goes somewhere."""
    _, name, place = predicate
    owner = scene.owner(place)
    bodies = () if owner is None else tuple(scene.bodies(owner))
    return Aim(predicate, tuple(scene.bodies(name)), bodies, place, name, owner or place)


def _moved(scene: Scene, predicate: Predicate) -> Aim:
    """`open`, `close`, `turnon` and the like: a part of a fixture is moved where it is."""
    place = predicate[1]
    owner = scene.owner(place)
    if owner is None:
        raise ValueError(f"the goal {' '.join(predicate)} names {place}, which belongs to nothing in the scene")
    every = scene.bodies(owner)
    part = _part(scene, place, owner, every)
    rest = tuple(body for body in every if body not in part)
    of_part = scene.model.body(part[0]).name
    return Aim(predicate, part, rest, None, of_part if rest else owner, owner)


def _part(scene: Scene, place: str, owner: str, every: Sequence[int]) -> tuple[int, ...]:
    """Bodies of the fixture that its joints move: of a region, those that the region moves with."""
    jointed = [body for body in every if scene.model.body_jntnum[body]]
    if place in scene.inner.object_sites_dict:
        body = int(scene.model.site_bodyid[scene.model.site(place).id])
        while body in every and body not in jointed:
            body = int(scene.model.body_parentid[body])
        jointed = [body] if body in jointed else jointed
    moved = [body for body in every if any(above in jointed for above in _up_to(scene.model, body, every))]
    return tuple(moved) or tuple(every)


def _up_to(model: Any, body: int, every: Sequence[int]) -> list[int]:
    """A body and those that it hangs on, inside the fixture."""
    found = []
    while body in every:
        found.append(body)
        body = int(model.body_parentid[body])
    return found


def classes_of_bodies(environment: LiberoEnvironment) -> NDArray[np.uint8]:
    """(number of bodies + 1,) the class of every body; the last is of pixels that show none.

    What several predicates name is a target before it is a goal, and either before it is a distractor, which is every
    other object and fixture. Arm and gripper are the robot's; all else is background.
    """
    scene, inner = Scene(environment.inner), environment.inner
    model, robot = scene.model, inner.robots[0]
    found = np.full(model.nbody + 1, BACKGROUND, dtype=np.uint8)
    for name in scene.names:
        found[scene.bodies(name)] = DISTRACTORS
    aims = aims_of(scene, environment.task.goal)
    for aim in aims:
        found[list(aim.goal)] = GOAL
    for aim in aims:
        found[list(aim.target)] = TARGET
    parts = {
        robot.robot_model.naming_prefix: ARM,
        robot.robot_model.mount.naming_prefix: ARM,
        robot.gripper.naming_prefix: GRIPPER,
    }
    for body in range(model.nbody):
        for prefix, kind in parts.items():
            if model.body(body).name.startswith(prefix):
                found[body] = kind
    return found
