"""`lightvla inspect-dataset`: whole data have no problem, and of broken ones each problem is found."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_rlds import aloha_features, encoded, hand_made, write_by_hand
from rich.console import Console

from lightvla.datasets.inspect_dataset import main
from lightvla.datasets.problems import Problem, find_problems
from lightvla.datasets.reading import StoredDataset, read_dataset
from lightvla.flags import inspect_dataset_parser
from prismatic.report.data import Notes
from prismatic.vla.datasets.catalog import get_dataset_spec
from prismatic.vla.datasets.entries.spec_file import find_dataset_spec, read_spec_file

IMAGE, WRIST = "steps/observation/image", "steps/observation/wrist_image"
STATE, ACTION, TEXT = "steps/observation/state", "steps/action", "steps/language_instruction"


def written(root: Path, change: Callable[[list[dict[str, Any]]], Any], name: str = "libero_own", **made: Any) -> Path:
    """Eight episodes of 20 to 27 steps, changed; the dataset's folder."""
    episodes = [hand_made(20 + seed, seed, **made) for seed in range(8)]
    change(episodes)
    return write_by_hand(root, name, train=episodes[:6], val=episodes[6:]).parent


def read(folder: Path, *flags: str | None) -> StoredDataset:
    return read_dataset(folder, get_dataset_spec(folder.name, *flags), 50, Console(quiet=True))


def problems(folder: Path, *flags: str | None) -> dict[str, Problem]:
    """By name; each says what it means and what to do."""
    found = find_problems(read(folder, *flags))
    assert all(len(problem.meaning) > 20 and len(problem.remedy) > 20 for problem in found)
    return {problem.name: problem for problem in found}


def nothing(episodes: list[dict[str, Any]]) -> None:
    """Leaves them as they are."""


def arguments(folder: Path, *more: str) -> argparse.Namespace:
    output = str(folder.parent / "report")
    return inspect_dataset_parser().parse_args([str(folder), "--output_dir", output, "--pictures", "20", *more])


def test_whole_data_have_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path, nothing)
    assert main(arguments(folder), Console()) == 0
    said = capsys.readouterr().out
    assert "libero_own: 8 episodes, 188 frames" in said and "nothing wrong was found" in said
    page, text = ((tmp_path / "report" / name).read_text() for name in ("report.html", "report.md"))
    assert "Stack the blocks" in page and page.count("data:image/jpeg") == 4
    assert "| libero: 7 action dimensions" in text and "Nothing wrong was found" in text
    pictures = re.findall(r"\]\((pictures/[^)]*)\)", text)
    assert len(pictures) == 4 and all((tmp_path / "report" / name).is_file() for name in pictures)


def test_the_statistics_are_those_of_training(tmp_path: Path) -> None:
    data = read(written(tmp_path, nothing))
    mapped = data.policy_actions()
    assert mapped is not None and {*mapped[:, 6].tolist()} == {0.0, 1.0}
    assert data.place(19) == (0, 19) and data.place(20) == (1, 0) and data.place(187) == (7, 26)


def broken_values(episodes: list[dict[str, Any]]) -> None:
    for episode in episodes:
        episode[ACTION][:, 2] = 0.25
        episode[STATE][:, 3] = 0
    episodes[2][ACTION][5, 1] = 90
    episodes[4][ACTION][7, 0] = np.nan
    episodes[5][STATE][3, 1] = np.inf


def test_broken_values(tmp_path: Path) -> None:
    found = problems(written(tmp_path, broken_values))
    assert list(found) == [
        "NaN in actions", "NaN in states", "constant dimensions of actions", "constant dimensions of states",
        "actions far out",
    ]  # fmt: skip
    assert "1 frame with NaN or infinity; the first at step 7 of episode 4" in found["NaN in actions"].found
    assert "--use_proprio False" in found["NaN in states"].remedy
    assert "z is 0.25" in found["constant dimensions of actions"].found
    assert "state 3 is 0" in found["constant dimensions of states"].found
    assert "1 frame in y; the first at step 5 of episode 2 with 90" in found["actions far out"].found


def test_nothing_but_nan_is_told_like_one(tmp_path: Path) -> None:
    def change(episodes: list[dict[str, Any]]) -> None:
        for episode in episodes:
            episode[ACTION][:] = np.nan
            episode[STATE][:] = np.inf

    folder = written(tmp_path, change)
    assert list(problems(folder)) == ["NaN in actions", "NaN in states"]
    assert main(arguments(folder), Console()) == 1


def test_problems_are_told_with_their_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = [hand_made(20 + seed, seed) for seed in range(8)]
    broken_values(episodes)
    folder = write_by_hand(tmp_path, "libero_own", train=episodes[4:5]).parent
    assert main(arguments(folder), Console()) == 1
    assert "wrong: NaN in actions: 1 frame" in capsys.readouterr().out
    text = (tmp_path / "report" / "report.md").read_text()
    assert "### NaN in actions\n\n- 1 frame with NaN or infinity; the first at step 7 of episode 0" in text
    assert text.count("- Remedy: ") == text.count("- What it means: ") == 3
    assert "![full_image, wrist_image, from" in text and "Episode 0, step 7: NaN in actions" in text


def test_a_gripper_that_is_not_as_it_is_said(tmp_path: Path) -> None:
    width = problems(written(tmp_path / "width", nothing, gripper=(0, 0.08)))
    assert list(width) == ["gripper range"]
    assert "which looks like width:0,0.08; stored values run from 0 to 0.08" in width["gripper range"].found
    assert problems(written(tmp_path / "unsaid", nothing, "kitchen", gripper=(0, 1)), "libero")[
        "gripper not said"
    ].found.startswith("stored 0 to 1, which looks like open1 or closed1; neither")
    assert list(problems(written(tmp_path / "still", nothing, gripper=(1, 1)))) == ["gripper range"]
    said = written(tmp_path / "said", nothing, "kitchen", gripper=(0, 1))
    assert not problems(said, "libero", "closed1")
    assert "8 of 8 episodes begin" in problems(said, "libero", "open1")["gripper begins closed"].found


def broken_pictures(episodes: list[dict[str, Any]]) -> None:
    episodes[1][IMAGE][4] = encoded(np.full((64, 64, 3), 3, np.uint8), "JPEG")
    episodes[2][IMAGE][6] = encoded(np.full((64, 64, 3), 200, np.uint8), "JPEG")
    episodes[3][WRIST][8:16] = [episodes[3][WRIST][7]] * 8
    for step in range(len(episodes[5][WRIST])):
        episodes[5][WRIST][step] = encoded(np.random.default_rng(step).integers(0, 255, (48, 64, 3), np.uint8), "JPEG")


def test_broken_pictures(tmp_path: Path) -> None:
    found = problems(written(tmp_path, broken_pictures))
    assert list(found) == [
        "mixed picture sizes of wrist_image", "black pictures of full_image", "one-coloured pictures of full_image",
        "duplicated frames of wrist_image",
    ]  # fmt: skip
    assert "64 x 48: " in found["mixed picture sizes of wrist_image"].found
    assert found["black pictures of full_image"].places == [(1, 4)]
    assert "8 frames (4.3%)" in found["duplicated frames of wrist_image"].found
    assert "the first at step 8 of episode 3" in found["duplicated frames of wrist_image"].found


def test_pictures_that_cannot_be_decoded_and_a_camera_that_is_not_there(tmp_path: Path) -> None:
    def change(episodes: list[dict[str, Any]]) -> None:
        episodes[0][IMAGE][0] = episodes[0][IMAGE][0][:300]
        for episode in episodes:
            del episode[WRIST]

    found = problems(written(tmp_path, change))
    assert list(found) == ["wrist_image cannot be read", "damaged pictures of full_image"]
    assert "step 0 of its episode" in found["damaged pictures of full_image"].found


def test_standing_still_is_found_and_a_gripper_that_closes_is_no_standing_still(tmp_path: Path) -> None:
    def stand(episodes: list[dict[str, Any]], fingers: float) -> None:
        for episode in episodes[:4]:
            episode[ACTION][4:12, :6] = 0
            episode[ACTION][3:12, 6] = 1
            episode[STATE][4:12] = episode[STATE][4]
            episode[STATE][4:12, 7] += fingers * np.arange(8)

    still = problems(written(tmp_path / "still", lambda episodes: stand(episodes, 0)))
    assert list(still) == ["no-ops"] and "28 frames (14.9%)" in still["no-ops"].found
    assert "step 4 of episode 0" in still["no-ops"].found
    assert not problems(written(tmp_path / "holding", lambda episodes: stand(episodes, 0.1)))


def broken_words(episodes: list[dict[str, Any]]) -> None:
    episodes[0][TEXT] = [b""] * 20
    episodes[1][TEXT][3] = b" "
    episodes[3][TEXT] = [b"b'stack the blocks'"] * 23
    episodes[4] = hand_made(5, 4)
    episodes[7] = episodes[2]


def test_broken_episodes(tmp_path: Path) -> None:
    found = problems(written(tmp_path, broken_words))
    assert list(found) == [
        "empty instructions", "instructions in quotes", "very short episodes", "episodes stored twice"
    ]  # fmt: skip
    assert (
        "21 frames without an instruction; episodes that have none at all: 1; the first"
        in found["empty instructions"].found
    )
    assert "the first is episode 4 with 5 frames" in found["very short episodes"].found
    copies = found["episodes stored twice"].found
    assert "the first is episode 7, a copy of 2" in copies and "in another split than the original: 1" in copies


def test_a_state_of_another_width_is_a_problem_and_actions_of_another_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = problems(written(tmp_path, nothing, state_dim=5))
    assert list(found) == ["no state"] and "needs 8" in found["no state"].found

    def narrow(episodes: list[dict[str, Any]]) -> None:
        for episode in episodes:
            episode[ACTION] = episode[ACTION][:, :6]

    for folder, message in (
        (written(tmp_path / "narrow", narrow), "needs 7"),
        (tmp_path / "libero_none", "there is no dataset folder"),
        (tmp_path / "kitchen", "unknown dataset 'kitchen'"),
    ):
        assert main(arguments(folder), Console()) == 2
        assert message in capsys.readouterr().err
    assert main(arguments(tmp_path / "libero_own", "--pictures", "0"), Console()) == 2


def test_a_file_says_how_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path, nothing, "kitchen", gripper=(0, 1))
    file = tmp_path / "own.yaml"
    file.write_text("robot: libero\ngripper: closed1\n")
    spec = find_dataset_spec("kitchen", file=read_spec_file(file))
    assert not find_problems(read_dataset(folder, spec, 50, Console(quiet=True)))
    file.write_text("robot: libero\ngriper: closed1\n")
    assert main(arguments(folder, "--dataset_spec", str(file)), Console()) == 2
    assert "unknown keys griper; known are name, robot" in capsys.readouterr().err


def test_positions_stand_still_where_they_stay(tmp_path: Path) -> None:
    def episode(seed: int, held: int) -> dict[str, Any]:
        features = {key: np.asarray(value, np.float32) for key, value in aloha_features(40, 16, seed).items()
                    if key in (STATE, ACTION)}  # fmt: skip
        for values in features.values():
            values.reshape(40, 14)[10 : 10 + held] = values.reshape(40, 14)[10]
        return {**aloha_features(40, 16, seed), **features}

    for held in (1, 12):
        folder = write_by_hand(tmp_path / str(held), "towels", train=[episode(0, held), episode(1, held)]).parent
        found = problems(folder, "aloha")
        assert list(found) == (["no-ops"] if held > 1 else [])
    assert "20 frames" in found["no-ops"].found  # of 11 repeated actions the last has a state that moves on


def test_what_is_told_on_the_page_is_what_was_found(tmp_path: Path) -> None:
    from lightvla.datasets.page import make_report

    data = read(written(tmp_path, broken_words))
    (tmp_path / "pictures").mkdir()
    report = make_report(data, find_problems(data), tmp_path)
    told = [block for block in report.filled[0].blocks if isinstance(block, Notes)]
    assert [block.title for block in told] == [
        "Empty instructions",
        "Instructions in quotes",
        "Very short episodes",
        "Episodes stored twice",
    ]
    assert report.headlines[0].value == "4" and "4 problems: empty instructions" in report.alerts[0]
