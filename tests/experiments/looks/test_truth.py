"""Classes and phases in the real simulator, against geometry and the motions of an expert."""

from collections.abc import Iterator

import numpy as np
import pytest

from experiments.robot.libero.demonstrations.experts import Expert
from experiments.robot.libero.looks.classes import CLASSES, aims_of, classes_of_bodies
from experiments.robot.libero.looks.phases import PHASES, Carried, Phases
from experiments.robot.libero.rollouts.rollout import Moment
from experiments.robot.libero.simulator.environment import CAMERAS, LiberoEnvironment
from experiments.robot.libero.simulator.scene import Scene
from experiments.robot.libero.simulator.tasks import load_task

SIZE = 128
BOWL, PLATE = "akita_black_bowl_1", "plate_1"


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(load_task("libero_goal", 8), SIZE, renderer="fast", seed=7) as environment:
        environment.reset(30)
        yield environment


def pixel_of(environment: LiberoEnvironment, camera: str, point: np.ndarray) -> tuple[int, int]:
    """Row and column of a point in the picture as datasets store it, by the camera's own place and field of view."""
    model, data = environment.model, environment.data
    number = model.camera(CAMERAS[camera]).id
    right, up, back = data.cam_xmat[number].reshape(3, 3).T
    away = point - data.cam_xpos[number]
    scale = SIZE / 2 / np.tan(np.deg2rad(model.cam_fovy[number]) / 2) / -(away @ back)
    column, row = SIZE / 2 + scale * (away @ right), SIZE / 2 - scale * (away @ up)
    return int(row), int(SIZE - column)  # MuJoCo's own picture stands upright; the stored one is mirrored, and no more


def test_classes_are_where_things_are(environment: LiberoEnvironment) -> None:
    scene, of_body = Scene(environment.inner), classes_of_bodies(environment)
    seen = of_body[environment.bodies("full_image")]
    for name, kind in ((BOWL, "target"), (PLATE, "goal")):
        where = np.argwhere(seen == CLASSES.index(kind))
        expected = [pixel_of(environment, "full_image", point) for point in scene.points(name)]
        apart = np.median(where, axis=0) - np.median(expected, axis=0)
        assert np.abs(apart).max() < 4, (name, apart)
    cheese = pixel_of(environment, "full_image", scene.points("cream_cheese_1").mean(axis=0))
    assert CLASSES[seen[cheese]] == "distractors"
    assert set(np.unique(seen)) == set(range(len(CLASSES)))


@pytest.mark.parametrize("camera", CAMERAS)
def test_what_is_told_apart_is_what_the_picture_shows(environment: LiberoEnvironment, camera: str) -> None:
    """The bowl is painted: exactly its pixels change, whatever way the picture is turned."""
    model = environment.model
    body = model.body(f"{BOWL}_main").id
    own = environment.bodies(camera) == body
    geoms = np.flatnonzero(model.geom_bodyid == body)
    before, colours, materials = environment.frame(camera), model.geom_rgba[geoms], model.geom_matid[geoms]
    model.geom_matid[geoms], model.geom_rgba[geoms] = -1, (1, 0, 1, 1)
    painted = environment.frame(camera)
    model.geom_rgba[geoms], model.geom_matid[geoms] = colours, materials
    changed = np.abs(painted.astype(int) - before).max(axis=2) > 8
    assert own.sum() > 100
    np.testing.assert_array_equal(changed, own)
    np.testing.assert_array_equal(environment.frame(camera), before)


def test_a_body_is_left_out_of_a_picture_and_of_nothing_else(environment: LiberoEnvironment) -> None:
    own = environment.bodies("full_image") == environment.model.body(f"{BOWL}_main").id
    body = environment.model.body(f"{BOWL}_main").id
    before, groups = environment.frame("full_image"), environment.model.geom_group.copy()
    without = environment.frame("full_image", [body])
    changed = (without != before).any(axis=2)
    assert changed[own].mean() > 0.9 and not changed[~own].any()  # the fast renderer draws no shadows
    np.testing.assert_array_equal(environment.model.geom_group, groups)
    np.testing.assert_array_equal(environment.frame("full_image"), before)


@pytest.mark.parametrize(
    ("task", "target", "goal"),
    [
        (1, BOWL, "flat_stove_1"),
        (4, BOWL, "wooden_cabinet_1"),
        (0, "wooden_cabinet_1_cabinet_middle", "wooden_cabinet_1"),
        (7, "flat_stove_1_button", "flat_stove_1"),
    ],
)
def test_roles_come_from_the_goal(environment: LiberoEnvironment, task: int, target: str, goal: str) -> None:
    (aim,) = aims_of(Scene(environment.inner), load_task("libero_goal", task).goal)
    assert (aim.target_name, aim.goal_name) == (target, goal)
    names = {environment.model.body(body).name for body in aim.target}
    assert names == {target if "_1_" in target else f"{target}_main"}
    assert aim.goal and not set(aim.goal) & set(aim.target)


def test_an_expert_goes_through_the_phases_in_order(environment: LiberoEnvironment) -> None:
    environment.reset(30)
    phases = Phases(environment)
    found = [phases.now(0)]
    scene = Scene(environment.inner)
    stood = scene.position(BOWL)[2]
    assert phases.carried() == [Carried(held=False, at_end=False, apart=None)]
    last = None
    for step, action in enumerate(Expert(environment).actions(), 1):
        environment.step(action)
        phases.step(Moment(environment, (), step), np.append(action[:6], (1 - action[6]) / 2))
        found.append(phases.now(step))
        up = scene.position(BOWL)[2] - stood
        if PHASES[found[-1]] == "carry":
            assert up >= 0.02
        (carried,) = phases.carried()
        if carried is not None and carried.at_end and up >= 0.02:
            last = scene.position(BOWL)[:2] - scene.position(PLATE)[:2]
            np.testing.assert_allclose(carried.apart, last)
    assert environment.succeeded()
    order = [PHASES[phase] for before, phase in zip([-1, *found], found, strict=False) if phase != before]
    assert order == ["reach", "grasp", "carry", "place", "reach"], order
    assert min(found.count(phase) for phase in range(len(PHASES))) >= 5
    (carried,) = phases.carried()
    assert carried is not None and carried.held and not carried.at_end
    assert carried.distance < 0.01  # LIBERO counts 3 cm; demonstrations are to show the middle
    assert last is not None and np.linalg.norm(last - carried.apart) < 0.01  # it was set down from there
