"""replay-plot and visualize read a LeRobot dataset as the RLDS that it was made of."""

from pathlib import Path

import numpy as np
import pytest
from fixtures_lerobot import write_lerobot
from fixtures_rlds import write_tiny_rlds

from lightvla.commands.visualize import dataset_frames, parse
from lightvla.flags import replay_plot_parser
from lightvla.recordings.replay_plot import read_episode
from prismatic.policy import Policy
from prismatic.vla.datasets.rlds import RldsIndex

NAME = "libero_tiny_no_noops"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same episodes as RLDS and as a LeRobot dataset."""
    root = tmp_path_factory.mktemp("both")
    write_tiny_rlds(root / "rlds", NAME)
    index = RldsIndex.open(root / "rlds", NAME)
    return root / "rlds" / NAME, write_lerobot(root / "lerobot" / NAME, index.episodes)


def test_the_episode_of_a_replay_plot(folders: tuple[Path, Path]) -> None:
    read = []
    for folder in folders:
        flags = ["--checkpoint", "none", "--dataset_dir", str(folder), "--episode", "2"]
        read.append(read_episode(replay_plot_parser().parse_args(flags))[1])
    one, other = read
    np.testing.assert_array_equal(one.action, other.action)
    np.testing.assert_array_equal(one.image("wrist_image", 7), other.image("wrist_image", 7))


def test_the_frames_that_visualize_asks_about(folders: tuple[Path, Path], small_policy_directory: Path) -> None:
    policy = Policy.from_pretrained(small_policy_directory, dtype="float32", engine="eager")
    found = []
    for folder in folders:
        command = ["--checkpoint", "none", "--dataset_dir", str(folder), "--episode", "1", "--every", "4"]
        found.append(dataset_frames(policy, parse(command)))
    (name, words, steps, one), (other_name, other_words, other_steps, other) = found
    assert (name, words, steps.tolist()) == (other_name, other_words, other_steps.tolist()) and len(one) == 4
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
