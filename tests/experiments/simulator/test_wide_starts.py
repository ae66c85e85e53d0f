"""Wide starts, judged by MuJoCo's own contacts."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.scene import Scene
from experiments.robot.libero.simulator.tasks import load_task
from experiments.robot.libero.simulator.wide_starts import Displacement


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(load_task("libero_goal", 8), render=False, settle_steps=0) as environment:
        yield environment


def places(environment: LiberoEnvironment, displacement: Displacement | None, state: int = 0) -> dict[str, np.ndarray]:
    environment.reset(state, displacement=displacement)
    scene = Scene(environment.inner)
    return {name: scene.position(name) for name in scene.names}


def touched(environment: LiberoEnvironment, name: str) -> set[str]:
    """Names of the other things that a thing touches."""
    scene = Scene(environment.inner)
    owner = {body: other for other in scene.names for body in scene.bodies(other)}
    pairs = environment.model.geom_bodyid[environment.data.contact.geom]
    partners = {body for pair in pairs if name in (owner.get(b) for b in pair.tolist()) for body in pair.tolist()}
    return {owner[body] for body in partners if body in owner} - {name}


def test_places_are_free_near_and_well_spread(environment: LiberoEnvironment) -> None:
    offsets = []
    for trial in range(25):
        standard = places(environment, None, trial)
        moved = places(environment, Displacement(0.06, trial=trial), trial)
        for name, place in moved.items():
            offset = place - standard[name]
            if name in ("akita_black_bowl_1", "plate_1"):
                assert np.abs(offset[:2]).max() <= 0.06
                assert offset[2] == 0
                assert touched(environment, name) == set()
                offsets.append(offset[:2])
            else:
                np.testing.assert_array_equal(offset, np.zeros(3))
    # A uniform draw from the whole square would give 3.5 cm; obstacles take some of it away.
    assert np.std(offsets, axis=0).min() > 0.015


def test_a_draw_is_a_pure_function_of_its_names(environment: LiberoEnvironment) -> None:
    draw = Displacement(0.06, seed=3, split="train", trial=1)
    first = places(environment, draw)["akita_black_bowl_1"]
    others = [replace(draw, seed=4), replace(draw, split="evaluation"), replace(draw, trial=2)]
    for other in others:
        assert not np.array_equal(places(environment, other)["akita_black_bowl_1"], first)
    np.testing.assert_array_equal(places(environment, draw)["akita_black_bowl_1"], first)


def test_what_moves(environment: LiberoEnvironment) -> None:
    scene = Scene(environment.inner)
    assert Displacement().objects(environment.task, scene) == ["akita_black_bowl_1", "plate_1"]
    assert Displacement(moved="manipulated").objects(environment.task, scene) == ["akita_black_bowl_1"]
    stove = replace(environment.task, goal=(("turnon", "flat_stove_1"),))
    assert Displacement().objects(stove, scene) == []


def test_a_bowl_on_the_stove_stays_there() -> None:
    task = load_task("libero_spatial", 7)
    assert task.language.startswith("pick up the black bowl on the stove")
    with LiberoEnvironment(task, render=False, settle_steps=0) as environment:
        assert Displacement().objects(task, Scene(environment.inner)) == ["plate_1"]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="displacement is 6.0 m"):
        Displacement(6.0)
    with pytest.raises(ValueError, match="unknown choice of displaced objects 'all'"):
        Displacement(moved="all")
