"""The open-loop replay: what is drawn is what the policy answers, and its errors are those of a loop over steps."""

from pathlib import Path

import numpy as np
import pytest
from fixtures_rlds import hand_made, write_by_hand
from PIL import Image
from rich.console import Console

from lightvla.flags import replay_plot_parser
from lightvla.recordings.replay_plot import OpenLoop, ask, main, read_episode
from prismatic.policy import Policy


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of a robot like LIBERO's whose gripper is stored 1 open, under a name that says nothing."""
    episodes = [hand_made(steps, gripper=(0, 1)) for steps in (12, 19)]
    return write_by_hand(tmp_path_factory.mktemp("data"), "kitchen", train=episodes).parent


def test_the_plot_is_what_the_policy_answers_over_the_episode(
    small_policy_directory: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(small_policy_directory), "--dataset_dir", str(dataset), "--episode", "1"]
    flags += ["--robot", "libero", "--gripper", "open1", "--output", str(tmp_path / "plot.png")]
    arguments, console = replay_plot_parser().parse_args(flags), Console(width=300)
    index, episode = read_episode(arguments)
    policy = Policy.from_pretrained(small_policy_directory, dtype="float32", engine="eager")
    loop = ask(policy, index, episode, arguments, console)
    assert loop.steps.tolist() == [0, 8, 16] and loop.predicted.shape == (3, 8, 7)
    np.testing.assert_array_equal(loop.recorded, episode.action)
    assert episode.state is not None
    for step, chunk in zip(loop.steps.tolist(), loop.predicted, strict=True):
        observation = {camera: episode.image(camera, step) for camera in policy.robot.cameras}
        alone = policy.act({**observation, "state": episode.state[step]}, episode.instruction)
        np.testing.assert_allclose(chunk, alone, atol=1e-4)
    assert loop.names[0] == "x" and loop.names[6] == "gripper"
    expected = np.zeros(7)
    for step in range(19):  # the last chunk goes beyond the episode
        expected += np.abs(loop.predicted[step // 8][step % 8] - episode.action[step]) / 19
    np.testing.assert_allclose(loop.errors, expected, rtol=1e-6)
    assert main(arguments, console) == 0
    said = capsys.readouterr().out
    assert "  gripper: mean error 0." in said and f"plot: {tmp_path / 'plot.png'}" in said
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_a_file_says_how_the_episode_is_read(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("robot: libero\ngripper: closed1\n")
    flags = ["--checkpoint", "none", "--dataset_dir", str(dataset), "--dataset_spec", str(tmp_path / "own.yaml")]
    index, episode = read_episode(replay_plot_parser().parse_args(flags))
    np.testing.assert_array_equal(index.spec.map_actions(episode.action)[:, 6], 1 - episode.action[:, 6])


def test_who_repeats_the_recorded_actions_has_no_error() -> None:
    recorded = np.random.default_rng(0).normal(size=(10, 7))
    chunks = np.stack([recorded[:4], recorded[4:8], np.concatenate([recorded[8:], np.full((2, 7), 9.0)])])
    loop = OpenLoop("x", recorded, np.array([0, 4, 8]), chunks, np.zeros(7), np.ones(7), tuple("abcdefg"))
    assert not loop.errors.any() and (loop.still_errors > 0).all()
    assert len(loop.figure().axes) == 7


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--episode", "2", "--robot", "libero", "--gripper", "open1"], "kitchen has 2 episodes, counted from 0"),
        (["--robot", "libero"], "nothing says how the gripper is stored"),
        ([], "unknown dataset 'kitchen'"),
        (["--robot", "libero", "--gripper", "open1", "--every", "0"], "--every 0: expected at least 1"),
    ],
)
def test_what_cannot_be_plotted_is_refused_before_the_policy_is_loaded(
    dataset: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = replay_plot_parser().parse_args(["--checkpoint", "nowhere", "--dataset_dir", str(dataset), *flags])
    assert main(arguments, Console(width=300)) == 2
    assert words in capsys.readouterr().err
