"""Names of datasets, and the gripper's convention."""

import numpy as np
import pytest

from prismatic.vla.datasets import catalog
from prismatic.vla.datasets.catalog import (
    DatasetSpec,
    bridge_episode,
    get_dataset_spec,
    keep_actions,
    register,
    settled_gripper,
)
from prismatic.vla.gripper import GRIPPERS, Gripper
from prismatic.vla.robots import ROBOTS


def test_published_names_are_known_and_libero_like_names_follow_them() -> None:
    for suite in ("spatial", "object", "goal", "10"):
        assert get_dataset_spec(f"libero_{suite}_no_noops").robot.name == "libero"
    own = get_dataset_spec("libero_my_demos")
    assert own.name == "libero_my_demos" and own.image_keys == get_dataset_spec("libero_goal_no_noops").image_keys


def test_an_unknown_name_lists_the_known_and_says_how_to_register() -> None:
    with pytest.raises(ValueError, match="unknown dataset 'bridge'.*libero_goal_no_noops.*register"):
        get_dataset_spec("bridge")


def test_users_register_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CATALOG", dict(catalog.CATALOG))
    mine = DatasetSpec("kitchen", image_keys={"full_image": "steps/observation/front"}, map_actions=keep_actions)
    assert register(mine) is register(mine) is get_dataset_spec("kitchen")
    with pytest.raises(ValueError, match="'kitchen' is registered already"):
        register(DatasetSpec("kitchen"))
    with pytest.raises(ValueError, match=r"'kitchen' cannot serve 2 images .*\['full_image'\]"):
        mine.camera_keys(2)


def test_names_of_libero_and_bridge_know_their_gripper_and_other_names_must_be_told() -> None:
    for name in ("libero_10_no_noops", "libero_my_demos"):
        assert get_dataset_spec(name).map_actions is GRIPPERS["libero"]
    assert get_dataset_spec("libero_my_demos", robot="libero").map_actions is GRIPPERS["libero"]
    assert get_dataset_spec("libero_my_demos", gripper="open1").map_actions is GRIPPERS["open1"]
    assert get_dataset_spec("bridge_orig").map_actions is GRIPPERS["open1"]
    for robot in ("libero", "bridge"):
        with pytest.raises(ValueError, match="nothing says how the gripper is stored"):
            get_dataset_spec("my_franka", robot).map_actions(np.zeros((2, 7)))
        said = get_dataset_spec("my_franka", robot, "width:0,0.08")
        assert said.map_actions == Gripper.parse("width:0,0.08")
    with pytest.raises(ValueError, match="nothing says how the gripper is stored"):
        DatasetSpec("kitchen").map_actions(np.zeros((2, 7)))


def test_a_gripper_that_is_known_already_or_is_not_mapped_is_not_said_again() -> None:
    assert get_dataset_spec("libero_10_no_noops", gripper="libero") is get_dataset_spec("libero_10_no_noops")
    with pytest.raises(ValueError, match="--gripper open1: dataset 'libero_10_no_noops' has an entry that says it"):
        get_dataset_spec("libero_10_no_noops", gripper="open1")
    with pytest.raises(ValueError, match="--gripper open1: robot 'aloha' is given its grippers' values as they are"):
        get_dataset_spec("towels", "aloha", "open1")
    stored = np.random.default_rng(0).normal(size=(3, 14)).astype(np.float32)
    mapped = get_dataset_spec("towels", "aloha").map_actions(stored)
    np.testing.assert_array_equal(mapped, stored)
    assert mapped is not stored


def test_a_robot_says_how_a_dataset_without_an_entry_is_read() -> None:
    for name in ROBOTS:
        spec = get_dataset_spec("kitchen", robot=name)
        assert spec.name == "kitchen" and spec.robot == ROBOTS[name]
        assert tuple(spec.camera_keys(len(spec.robot.cameras))) == spec.robot.cameras
    assert get_dataset_spec("libero_own", robot="bridge").robot.name == "bridge", "the flag counts more than the name"
    with pytest.raises(ValueError, match="unknown robot 'spot'; known: aloha, bridge, libero"):
        get_dataset_spec("kitchen", robot="spot")


def test_a_robot_must_be_the_one_of_the_datasets_entry() -> None:
    assert get_dataset_spec("aloha1_put_X_into_pot_300_demos", robot="aloha").robot.chunk_length == 25
    assert get_dataset_spec("aloha1_put_X_into_pot_300_demos").robot.name == "aloha"
    with pytest.raises(ValueError, match="--robot aloha: dataset 'libero_10_no_noops' is of robot 'libero'; leave the"):
        get_dataset_spec("libero_10_no_noops", robot="aloha")


def test_a_gripper_between_open_and_closed_counts_as_where_it_is_going() -> None:
    positions = np.array([1.0, 0.96, 0.5, 0.2, 0.04, 0.0, 0.5, 0.95, 1.0, 0.4, 0.3])
    expected = [1, 1, 0, 0, 0, 0, 1, 1, 1, 0.3, 0.3]  # behind the last settled one: the last value, 0.3
    np.testing.assert_allclose(settled_gripper(positions), expected, atol=1e-7)
    assert settled_gripper(np.zeros(0)).shape == (0,)


def test_actions_of_bridge_are_the_way_that_the_arm_went() -> None:
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(6, 7)).astype(np.float32), rng.normal(size=(6, 7)).astype(np.float32)
    actions[:, 6] = [0, 1, 0.5, 0, 1, 1]
    mapped, steps = bridge_episode(actions, states)
    kept = list(range(6))[steps]
    assert kept == [1, 2, 3, 4] and mapped.dtype == np.float32
    for row, step in zip(mapped, kept, strict=True):
        np.testing.assert_allclose(row[:6], states[step + 1, :6] - states[step, :6], atol=1e-6)
    assert mapped[:, 6].tolist() == [1, 0, 0, 1]
    for length in range(3):
        mapped, steps = bridge_episode(actions[:length], states[:length])
        assert mapped.shape == (0, 7) and states[:length][steps].shape == (0, 7)
    with pytest.raises(ValueError, match="follow from its states"):
        bridge_episode(actions, None)
