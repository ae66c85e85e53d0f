"""Objects moved by hand, and what one scene can be asked for."""

from collections.abc import Iterator

import numpy as np
import pytest

from experiments.robot.libero.play.moves import Moves, movable_objects
from experiments.robot.libero.play.robot import tasks_of_scene
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.scene import Scene
from experiments.robot.libero.simulator.tasks import load_task

pytestmark = pytest.mark.slow  # the simulator is built


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(load_task("libero_goal", 8), render=False, settle_steps=2) as environment:
        yield environment


def places(environment: LiberoEnvironment) -> dict[str, np.ndarray]:
    scene = Scene(environment.inner)
    return {name: scene.position(name)[:2] for name in scene.names}


def test_what_is_moved_stands_there_and_nothing_else_is_moved(environment: LiberoEnvironment) -> None:
    environment.reset(30, seed=7)
    before = places(environment)
    environment.reset(30, seed=7, displacement=Moves({"plate_1": (0.05, 0.02)}))
    for name, place in places(environment).items():
        np.testing.assert_allclose(place - before[name], [0.05, 0.02] if name == "plate_1" else [0, 0], atol=2e-3)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ({"plate_1": (0.0, -0.12)}, "plate_1 cannot stand there"),  # in the cabinet
        ({"plate_1": (0.29, 0.0)}, "the arm does not reach it"),
        ({"wooden_cabinet_1": (0.01, 0.0)}, "'wooden_cabinet_1' cannot be moved; this scene has akita_black_bowl_1"),
        ({"plate_1": (0.5, 0.0)}, "expected at most 0.3"),
        ({"plate_1": (float("nan"), 0.0)}, "expected at most 0.3"),
    ],
)
def test_what_cannot_be_moved_so_is_said(
    environment: LiberoEnvironment, offsets: dict[str, tuple[float, float]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        environment.reset(30, seed=7, displacement=Moves(offsets))


def test_the_tasks_of_a_scene(environment: LiberoEnvironment) -> None:
    assert [task.index for task in tasks_of_scene(environment.task)] == list(range(10))
    kitchen = load_task("libero_10", 0)
    assert [task.name for task in tasks_of_scene(kitchen)][0] == kitchen.name
    assert len(tasks_of_scene(kitchen)) < 10
    assert movable_objects(Scene(environment.inner)) == [
        "akita_black_bowl_1", "cream_cheese_1", "wine_bottle_1", "plate_1",
    ]  # fmt: skip
