"""LIBERO's HDF5 files: what is read of them, and what is said of those that cannot be used."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from libero_hdf5 import Demo, write_hdf5

from experiments.robot.libero.demonstrations.hdf5_files import file_of, fixture_poses, read_demonstrations
from experiments.robot.libero.demonstrations.replaying import is_noop
from experiments.robot.libero.simulator.tasks import LiberoTask

WIDTH = 5
TASK = LiberoTask("libero_goal", 8, "put_the_bowl_on_the_plate", "", Path(), (), np.zeros((1, WIDTH)))
MODEL = """<mujoco><worldbody><body name="stove" pos="0.1 -0.2 0.9"><body name="knob" quat="0 0 0 1"/></body>
</worldbody></mujoco>"""


def demo(steps: int, seed: int, model_file: str = "") -> Demo:
    rng = np.random.default_rng(seed)
    return Demo(rng.uniform(-1, 1, (steps, 7)), rng.normal(size=(steps, WIDTH)), model_file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    demos = [demo(3, 0), demo(4, 1, MODEL), *(demo(2, seed) for seed in range(2, 11))]
    return write_hdf5(tmp_path / "put_the_bowl_on_the_plate_demo.hdf5", TASK, demos)


def test_demonstrations_are_read_in_the_order_of_their_numbers(file: Path) -> None:
    found = read_demonstrations(file_of(file.parent, TASK), TASK)
    assert [it.name for it in found] == [f"demo_{number}" for number in range(11)]  # by name, demo_10 came second
    np.testing.assert_array_equal(found[10].actions, demo(2, 10).actions)
    np.testing.assert_array_equal(found[1].initial_state, demo(4, 1).states[0])
    assert len({it.sha256 for it in found}) == 11
    assert fixture_poses(found[0]) == {}
    poses = fixture_poses(found[1])
    np.testing.assert_array_equal(poses["stove"][0], [0.1, -0.2, 0.9])
    np.testing.assert_array_equal(poses["stove"][1], [1, 0, 0, 0])
    np.testing.assert_array_equal(poses["knob"][1], [0, 0, 0, 1])


def test_the_folder_may_be_the_one_above_the_suites(file: Path, tmp_path: Path) -> None:
    (tmp_path / "libero_goal").mkdir()
    moved = file.rename(tmp_path / "libero_goal" / file.name)
    assert file_of(tmp_path, TASK) == moved


def test_a_missing_file_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="put_the_bowl_on_the_plate_demo.hdf5 in .*, but there is none; give"):
        file_of(tmp_path, TASK)
    (tmp_path / "open_the_door_demo.hdf5").touch()
    with pytest.raises(FileNotFoundError, match="HDF5 files there are open_the_door_demo.hdf5; give another --libero"):
        file_of(tmp_path, TASK)
    with pytest.raises(FileNotFoundError, match="none does not exist; give the folder"):
        file_of(tmp_path / "none", TASK)


def _replace(name: str, values: np.ndarray) -> Callable[[h5py.Group], None]:
    def change(data: h5py.Group) -> None:
        del data["demo_1"][name]
        data["demo_1"][name] = values

    return change


def _remove(*names: str) -> Callable[[h5py.Group], None]:
    def change(data: h5py.Group) -> None:
        for name in names:
            del data[name]

    return change


def _rename(data: h5py.Group) -> None:
    data.attrs["bddl_file_name"] = "bddl_files/libero_goal/turn_on_the_stove.bddl"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_remove("demo_1/states"), "demo_1 lacks states; it has actions, dones, obs"),
        (_remove("demo_1/states", "demo_1/actions"), "demo_1 lacks actions and states; it has dones"),
        (_remove(*(f"demo_{number}" for number in range(11))), "has no demonstrations: expected data/demo_0"),
        (_replace("actions", np.zeros((3, 7))), "demo_1: expected as many steps .*; got actions 3, states 4"),
        (_replace("obs/ee_pos", np.zeros((5, 3))), "obs/ee_pos 5"),
        (_replace("actions", np.zeros((4, 8))), r"expected actions of 7 finite numbers; got shape \(4, 8\)"),
        (_replace("actions", np.full((4, 7), np.nan)), "expected actions of 7 finite numbers"),
        (_replace("states", np.zeros((4, WIDTH + 1))), r"shape \(4, 6\), and this task's have 5 .* version of LIBERO"),
        (_replace("states", np.full((4, WIDTH), np.inf)), "the first state holds NaN or infinity"),
        (_rename, "holds demonstrations of 'turn_on_the_stove', not of libero_goal task 8"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(file: Path, change: Callable[[h5py.Group], None], said: str) -> None:
    with h5py.File(file, "a") as stored:
        change(stored["data"])
    with pytest.raises(ValueError, match=said) as refused:
        read_demonstrations(file, TASK)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_are_no_whole_hdf5(file: Path, tmp_path: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is no HDF5 file, or not all of one"):
        read_demonstrations(file, TASK)
    with h5py.File(tmp_path / "other.hdf5", "w"):
        pass
    with pytest.raises(ValueError, match="has no group 'data'"):
        read_demonstrations(tmp_path / "other.hdf5", TASK)


def action(gripper: float, arm: float = 0.0) -> list[float]:
    return [arm, 0.0, 0.0, 0.0, 0.0, arm, gripper]


@pytest.mark.parametrize(
    ("step", "last_gripper", "rests", "noop"),
    [
        (action(-1), -1, True, True),
        (action(1), 1, True, True),  # holding something, the arm still
        (action(-1, arm=5e-5), -1, True, True),
        (action(-1, arm=8e-5), -1, True, False),  # the norm of all six counts
        (action(1), -1, True, False),  # the gripper begins to close
        (action(1), 1, False, False),  # it is still closing
        (action(-1), -1, False, False),  # it is still opening
        (action(0.5), 1, True, True),  # of the gripper the sign alone is executed
    ],
)
def test_a_noop_moves_neither_arm_nor_gripper(step: list[float], last_gripper: float, rests: bool, noop: bool) -> None:
    assert is_noop(step, last_gripper, rests) is noop
