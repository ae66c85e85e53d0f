"""Collecting demonstrations: the choice of starts, cutting at pushes, and the whole way to a dataset on disk."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.robot.libero.demonstrations.collect import Candidate, Outcome, collect, finished, plan, write
from experiments.robot.libero.demonstrations.config import CollectionConfig, choose_indices
from experiments.robot.libero.demonstrations.demonstration import Recording
from experiments.robot.libero.demonstrations.files import load_episodes, save_demonstration
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import LiberoTask, load_task
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.images import decode_jpeg

SIZE = 64


@pytest.fixture
def config(tmp_path: Path) -> CollectionConfig:
    return CollectionConfig(
        output_dir=tmp_path,
        dataset_name="libero_tiny",
        task_ids="8",
        initial_states="2-3",
        num_demos_per_task="1",
        resolution=SIZE,
        renderer="fast",
        num_processes=1,
        wide_starts_m=0.06,
        recovery_pushes=True,
        canonical_quaternion=True,
    )


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(load_task("libero_goal", 8), SIZE, renderer="fast") as environment:
        yield environment


def test_a_dataset_is_collected_and_a_second_run_finds_it(config: CollectionConfig) -> None:
    seen: list[tuple[LiberoTask, Outcome]] = []
    tasks = plan(config)
    # What an interrupted run leaves: the first start was tried in vain.
    config.cache_dir.mkdir(parents=True)
    (config.cache_dir / "libero_goal_8_state002_trial0.json").write_text(json.dumps(["the grasp did not hold"]))
    results = collect(config, tasks, lambda task, outcome: seen.append((task, outcome)))
    assert [(outcome.candidate.initial_state, outcome.file is not None) for _, outcome in seen] == [
        (2, False),
        (3, True),
    ]
    again = collect(config, tasks, lambda task, outcome: None)
    assert again == results  # everything saved; no simulator is started

    saved = [episode for file in results[0].files for episode in load_episodes(file)]
    folder = write(config, results)
    assert folder == config.dataset_dir
    assert not config.cache_dir.exists()
    summary = finished(config)
    assert summary is not None
    assert summary[0]["demonstrations"] == 1
    assert summary[0]["unsolved"] == ["state002_trial0"]

    index = RldsIndex.open(config.output_dir, config.dataset_name).with_checked_gripper()
    assert len(index.episodes) == len(saved)
    stored = {episode.action.tobytes(): episode for episode in index.episodes}
    for episode in saved:
        found = stored[episode.actions.astype(np.float32).tobytes()]
        assert found.instruction == "put the bowl on the plate"
        np.testing.assert_array_equal(found.state, episode.states.astype(np.float32))
        assert (episode.states[:, 3] >= 0).all()
        assert set(episode.actions[:, 6]) <= {-1.0, 1.0}
        assert len(episode.actions) >= 9
        for picture in (*episode.images, *episode.wrist_images):
            assert isinstance(picture, bytes)
            assert decode_jpeg(picture).shape == (SIZE, SIZE, 3)

    with pytest.raises(ValueError, match="made with other settings"):
        plan(replace(config, seed=8))


def test_saved_episodes_are_the_segments_drawn_from_their_poses(environment: LiberoEnvironment, tmp_path: Path) -> None:
    environment.reset(0)
    rng = np.random.default_rng(0)
    frames, qpos, states, actions = [], [], [], rng.uniform(-1, 1, (30, 7))
    for action in actions:
        frames.append(environment.frame("full_image").astype(int))
        qpos.append(environment.data.qpos.copy())
        states.append(environment.state())
        environment.step(action)
    wanted = np.ones(30, dtype=bool)
    wanted[[0, 10, 11]] = False
    recording = Recording(np.stack(qpos), np.stack(states), actions, wanted, success_step=20)
    save_demonstration(environment, recording, tmp_path / "state000_trial0.npz")

    episodes = list(load_episodes(tmp_path / "state000_trial0.npz"))
    assert [len(episode.actions) for episode in episodes] == [9, 18]
    for episode, part in zip(episodes, (slice(1, 10), slice(12, 30)), strict=True):
        np.testing.assert_array_equal(episode.actions, actions[part])
        np.testing.assert_array_equal(episode.states, recording.states[part])
        for picture, frame in zip(episode.images, frames[part], strict=True):
            assert np.abs(decode_jpeg(picture) - frame).mean() < 4
    assert episodes[1].metadata["file_path"] == ("libero_goal/put_the_bowl_on_the_plate/state000_trial0/segment1")
    assert [path.name for path in tmp_path.iterdir()] == ["state000_trial0.npz"]


def test_candidate_names_sort_and_settings_that_matter_separate(config: CollectionConfig) -> None:
    assert Candidate(7, 2).name == "state007_trial2"
    same = replace(config, num_demos_per_task="5", num_processes=3, initial_states="0-9", dataset_name="other")
    assert same.fingerprint() == config.fingerprint()
    for change in ({"seed": 8}, {"renderer": "robosuite"}, {"wide_starts_m": 0.05}, {"resolution": 128}):
        assert replace(config, **change).fingerprint() != config.fingerprint()


def test_choosing_indices() -> None:
    assert choose_indices("all", 3, "task_ids") == [0, 1, 2]
    assert choose_indices("0,2-4", 5, "task_ids") == [0, 2, 3, 4]
    with pytest.raises(ValueError, match="--task_ids '2-5': there is no 5; expected 0 to 4"):
        choose_indices("2-5", 5, "task_ids")
    with pytest.raises(ValueError, match="--task_ids"):
        choose_indices("x", 5, "task_ids")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"renderer": "vulkan"}, "unknown renderer 'vulkan'; known: robosuite, fast"),
        ({"num_processes": 0}, "num_processes is 0; expected at least 1"),
        ({"steps_past_success": -1}, "steps_past_success is -1"),
        ({"wide_starts_m": 6.0}, "displacement is 6.0 m"),
        ({"wide_starts_objects": "all"}, "unknown choice of displaced objects 'all'"),
    ],
)
def test_bad_flags_are_named(flags: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CollectionConfig(**{"wide_starts_m": 0.06, **flags}).validate()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"task_suite_name": "libero_goal,libero_kitchen"},
            "unknown LIBERO suite 'libero_kitchen'; known: standard: libero_spatial",
        ),
        ({"task_ids": "10"}, "there is no 10; expected 0 to 9"),
        ({"initial_states": "50"}, "there is no 50; expected 0 to 49"),
        ({"num_demos_per_task": "5,5"}, "num_demos_per_task is '5,5'; expected a number from 1 on, or 10 of them"),
        ({"num_demos_per_task": "0"}, "num_demos_per_task is '0'; expected a number from 1 on"),
        ({"num_demos_per_task": "51"}, "51 demonstrations per task need as many initial states, and 50 are chosen"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path: Path, flags: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan(CollectionConfig(output_dir=tmp_path, **flags))


def test_a_share_of_the_demonstrations_begins_at_wide_starts() -> None:
    def wide(share: float) -> list[bool]:
        config = CollectionConfig(wide_starts_m=0.06, wide_starts_share=share)
        return [config.displacement(state, trial) is not None for state in range(50) for trial in range(10)]

    assert all(wide(1.0)) and not any(wide(0.0))
    assert 0.25 < np.mean(wide(0.3)) < 0.35
    with pytest.raises(ValueError, match="wide_starts_share is 1.5; expected 0 to 1"):
        CollectionConfig(wide_starts_share=1.5).validate()


def test_tasks_may_have_different_numbers_of_demonstrations() -> None:
    assert CollectionConfig(num_demos_per_task="4").demonstrations(3) == [4, 4, 4]
    assert CollectionConfig(num_demos_per_task="4,5,60").demonstrations(3) == [4, 5, 60]


def test_a_folder_that_cannot_be_written_is_named_at_once(config: CollectionConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write into .*/file; choose another --output_dir"):
        plan(replace(config, output_dir=tmp_path / "file"))
