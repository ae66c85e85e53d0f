"""Statistics against plain NumPy over all frames, and their cache."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures_rlds import tiny_episodes

from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.statistics import dataset_statistics

NAME = "libero_tiny_no_noops"


@pytest.fixture
def index(tiny_root: Path, tmp_path: Path) -> RldsIndex:
    shutil.copytree(tiny_root / NAME, tmp_path / NAME, ignore=shutil.ignore_patterns("dataset_statistics*"))
    return RldsIndex.open(tmp_path, NAME)


def cache_files(index: RldsIndex) -> list[Path]:
    return sorted(index.directory.glob("dataset_statistics_*.json"))


def test_covers_every_frame_of_every_split_with_the_gripper_mapped(index: RldsIndex) -> None:
    statistics = dataset_statistics(index)
    written = tiny_episodes()
    actions = np.concatenate([episode.actions for episode in written]).astype(np.float32).astype(np.float64)
    actions[:, 6] = (actions[:, 6] < 0).astype(float)
    states = np.concatenate([episode.states for episode in written]).astype(np.float32).astype(np.float64)
    assert statistics["num_transitions"] == len(actions) == 12 + 13 + 14 and statistics["num_trajectories"] == 3
    assert statistics["action"]["mask"] == [True] * 6 + [False] and "mask" not in statistics["proprio"]
    for part, values in (("action", actions), ("proprio", states)):
        expected = {
            "mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0),
            "q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0),
        }  # fmt: skip
        for name, value in expected.items():
            np.testing.assert_allclose(statistics[part][name], value, rtol=1e-9, atol=1e-12, err_msg=f"{part} {name}")


def test_a_corrected_mask_is_not_answered_from_before(index: RldsIndex) -> None:
    wrong = replace(index.spec, robot=replace(index.spec.robot, action_mask=(True,) * 3 + (False,) * 4))
    assert dataset_statistics(index, wrong)["action"]["mask"] == [True] * 3 + [False] * 4
    assert dataset_statistics(index)["action"]["mask"] == [True] * 6 + [False]
    assert len(cache_files(index)) == 2


def test_a_state_that_was_not_read_has_no_statistics_and_the_split_test_has(index: RldsIndex) -> None:
    unread = replace(index, episodes=[replace(episode, state=None, split="test") for episode in index.episodes])
    statistics, whole = dataset_statistics(unread), dataset_statistics(index)
    assert "proprio" not in statistics and statistics["action"] == whole["action"]
    assert statistics["num_transitions"] == 12 + 13 + 14 and len(cache_files(index)) == 2


def test_is_cached_in_the_published_format_and_read_back(index: RldsIndex) -> None:
    statistics = dataset_statistics(index)
    (path,) = cache_files(index)
    assert json.loads(path.read_text()) == {NAME: statistics}
    marked = {NAME: {**statistics, "num_trajectories": 99}}
    path.write_text(json.dumps(marked))
    assert dataset_statistics(index)["num_trajectories"] == 99
    path.write_text('{"half')
    assert dataset_statistics(index) == statistics
    assert json.loads(path.read_text()) == {NAME: statistics}
    assert [p.name for p in index.directory.iterdir() if "partial" in p.name] == []


def test_changed_data_gets_new_statistics(index: RldsIndex) -> None:
    before = dataset_statistics(index)
    fewer = dataset_statistics(replace(index, episodes=index.episodes[:2]))
    assert fewer["num_trajectories"] == 2 and fewer["num_transitions"] < before["num_transitions"]
    episode = index.episodes[0]
    edited = replace(index, episodes=[replace(episode, action=episode.action * 2), *index.episodes[1:]])
    assert dataset_statistics(edited)["action"]["std"] != before["action"]["std"]
    assert len(cache_files(index)) == 3
    assert dataset_statistics(index) == before


def test_a_folder_that_cannot_be_written_is_only_logged(index: RldsIndex, caplog: pytest.LogCaptureFixture) -> None:
    expected = dataset_statistics(index)
    (path,) = cache_files(index)
    path.unlink()
    path.mkdir()  # permissions would not stop the superuser, a folder of that name does
    with caplog.at_level(logging.WARNING):
        assert dataset_statistics(index) == expected
    assert "cannot keep the statistics" in caplog.text and NAME in caplog.text
