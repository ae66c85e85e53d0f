"""LIBERO's HDF5 demonstrations replayed in the simulator, as an RLDS dataset."""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from libero_hdf5 import Demo, write_hdf5
from numpy.typing import NDArray

from experiments.robot.libero.demonstrations.config import RegenerationConfig
from experiments.robot.libero.demonstrations.demonstration import Recording, demonstrate
from experiments.robot.libero.demonstrations.files import load_episodes, save_demonstration
from experiments.robot.libero.demonstrations.hdf5_files import read_demonstrations
from experiments.robot.libero.demonstrations.regenerate import STATES_FILE, finished, plan, regenerate, write
from experiments.robot.libero.demonstrations.replaying import ReplayFailed, replay
from experiments.robot.libero.demonstrations.rlds_writer import Episode, write_rlds
from experiments.robot.libero.simulator.backend import simulator
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.states_file import read_initial_states
from experiments.robot.libero.simulator.tasks import LiberoTask, load_task
from prismatic.vla.datasets.rlds import RldsIndex

SIZE = 64
PAUSE = 12
"""A step at which the scripted expert is on its way to the bowl, with the gripper open and at rest."""


@dataclass(frozen=True)
class Own:
    """Demonstrations of our own: recordings, their pictures as `lightvla collect` saves them, and their HDF5 file."""

    task: LiberoTask
    recordings: list[Recording]
    episodes: list[Episode]
    folder: Path


def paused(actions: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """With so many more steps at `PAUSE` in which nothing is to move."""
    return np.insert(actions, [PAUSE] * steps, [0, 0, 0, 0, 0, 0, -1], axis=0)


def stored(environment: LiberoEnvironment, actions: NDArray[np.float64], number: int) -> Demo:
    """As LIBERO stores it, from an initial state; of the later states a replay reads nothing."""
    states = np.zeros((len(actions), environment.task.init_states.shape[1]))
    states[0] = environment.task.init_states[number]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.xml"
        simulator().mujoco.mj_saveLastXML(str(file), environment.model)
        return Demo(actions, states, file.read_text())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    """Two demonstrations; in the file also the first with pauses, and one that ends too soon."""
    folder, task = tmp_path_factory.mktemp("hdf5"), load_task("libero_goal", 8)
    recordings, episodes, demos = [], [], []
    with LiberoEnvironment(task, SIZE, renderer="fast") as environment:
        for number in (0, 1):
            environment.reset(number)
            recordings.append(demonstrate(environment, 0, np.random.default_rng(number)))
            save_demonstration(environment, recordings[-1], folder / f"{number}.npz")
            episodes += load_episodes(folder / f"{number}.npz")
            demos.append(stored(environment, recordings[-1].actions, number))
        demos.append(stored(environment, paused(recordings[0].actions, 7), 0))
        demos.append(stored(environment, recordings[0].actions[:40], 0))
    write_hdf5(folder / f"{task.name}_demo.hdf5", task, demos)
    return Own(task, recordings, episodes, folder)


def config(own: Own, target: Path, **changes: object) -> RegenerationConfig:
    flags = RegenerationConfig(
        libero_raw_data_dir=own.folder, libero_target_dir=target, task_ids="8", resolution=SIZE, renderer="fast"
    )
    return replace(flags, num_processes=1, **changes)  # type: ignore[arg-type]


def pictures(index: RldsIndex, number: int) -> list[bytes]:
    episode = index.episodes[number]
    return [
        episode.image_bytes(camera, step)
        for camera in ("full_image", "wrist_image")
        for step in range(len(episode.action))
    ]


@pytest.mark.slow
def test_the_dataset_equals_the_one_of_the_same_demonstrations(own: Own, tmp_path: Path) -> None:
    flags = config(own, tmp_path, drop_noops=False, demonstrations="0-1")
    replays = plan(flags)
    regenerate(flags, replays, lambda task, outcome: None)
    write(flags, replays)
    write_rlds(tmp_path, "libero_collected", own.episodes, SIZE)

    ours, collected = (RldsIndex.open(tmp_path, name) for name in ("libero_goal_with_noops", "libero_collected"))
    assert len(ours.episodes) == len(collected.episodes) == 2
    order = {episode.action.tobytes(): number for number, episode in enumerate(collected.episodes)}
    for number, episode in enumerate(ours.episodes):
        twin = order[episode.action.tobytes()]
        np.testing.assert_array_equal(episode.state, collected.episodes[twin].state)
        assert episode.instruction == collected.episodes[twin].instruction == "put the bowl on the plate"
        assert pictures(ours, number) == pictures(collected, twin)


@pytest.mark.slow
def test_noops_go_gripper_hold_steps_stay_and_failures_are_left_out(own: Own, tmp_path: Path) -> None:
    flags = config(own, tmp_path)
    replays = plan(flags)
    seen = []
    regenerate(flags, replays, lambda task, outcome: seen.append(outcome))
    outcomes = replays[0].outcomes
    assert [it.number for it in replays[0].kept] == [0, 1, 2] and len(seen) == 4
    assert outcomes[3].reason == "the goal did not hold at its end"

    # What an interruption may leave: pictures without an outcome. Only that demonstration is made again.
    cached = {path: path.stat().st_mtime_ns for path in flags.cache_dir.iterdir()}
    (undone,) = flags.cache_dir.glob("*_demo_1_*.json")
    undone.unlink()
    again = plan(flags)
    regenerate(flags, again, lambda task, outcome: None)
    assert again[0].outcomes == outcomes
    changed = {path for path, time in cached.items() if path.stat().st_mtime_ns != time}
    assert changed == {undone, undone.with_suffix(".npz")}

    folder = write(flags, again)
    assert not flags.cache_dir.exists() and not flags.cache_dir.parent.exists()
    index = RldsIndex.open(tmp_path, "libero_goal_no_noops").with_checked_gripper()
    for number, recording in enumerate(own.recordings):
        kept = index.episodes[number].action
        # The expert never waits but for its gripper, in steps that a comparison of commands alone takes for no-ops.
        still = np.linalg.norm(recording.actions[:, :6], axis=1) < 1e-4
        holds = still[1:] & (recording.actions[1:, 6] == recording.actions[:-1, 6])
        assert holds.sum() > 10
        np.testing.assert_array_equal(kept, recording.actions.astype(np.float32))
    assert outcomes[2].dropped == 7
    assert pictures(index, 2) == pictures(index, 0)
    np.testing.assert_array_equal(index.episodes[2].state, index.episodes[0].state)

    assert plan(flags) and finished(flags, again) == [one.summary() for one in again]
    with pytest.raises(ValueError, match="was made with other settings or from other files"):
        plan(replace(flags, settle_steps=11))
    states = read_initial_states(str(folder / STATES_FILE), own.task)
    assert list(states) == [0, 1, 2]
    np.testing.assert_array_equal(states[1], own.task.init_states[1])
    assert not json.loads((folder / STATES_FILE).read_text())["put_the_bowl_on_the_plate"]["demo_3"]["success"]


@pytest.mark.slow
def test_fixtures_stand_where_they_stood(tmp_path: Path) -> None:
    task = load_task("libero_goal", 8)
    with LiberoEnvironment(task, SIZE, render=False, seed=3) as environment:
        environment.reset(0)
        recording = demonstrate(environment, 0, np.random.default_rng(0))
        places = {
            name: environment.model.body(name).pos.copy() for name in ("flat_stove_1_main", "wooden_cabinet_1_main")
        }
        demos = [stored(environment, recording.actions, 0), stored(environment, recording.actions[:5], 0)]
    file = write_hdf5(tmp_path / f"{task.name}_demo.hdf5", task, demos)
    whole, short = read_demonstrations(file, task)
    with LiberoEnvironment(task, SIZE, render=False) as environment:
        environment.reset(0)
        assert max(np.abs(environment.model.body(name).pos - place).max() for name, place in places.items()) > 1e-3
        again = replay(environment, whole, drop_noops=False).recording
        for name, place in places.items():
            np.testing.assert_allclose(environment.model.body(name).pos, place, atol=1e-5)
        np.testing.assert_allclose(again.states, recording.states, atol=1e-4)
        with pytest.raises(ReplayFailed, match="only 5 steps are left of it, and 9 are needed"):
            replay(environment, short, drop_noops=False)
