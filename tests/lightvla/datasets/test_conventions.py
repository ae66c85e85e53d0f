"""What a LeRobot dataset of LIBERO's robot says itself of its conventions, in a report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures_lerobot import write_lerobot
from fixtures_rlds import encoded, hand_made, write_by_hand
from rich.console import Console

from lightvla.datasets.inspect_dataset import main
from lightvla.datasets.problems import find_problems
from lightvla.datasets.reading import read_dataset
from lightvla.flags import inspect_dataset_parser
from prismatic.vla.datasets.catalog import LAYOUTS, DatasetSpec
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.stored.episode import Episode
from prismatic.vla.datasets.stored.turning import Turn
from prismatic.vla.gripper import GRIPPERS

SPEC = replace(LAYOUTS["libero"], name="arm", map_actions=GRIPPERS["libero"])
OTHER = ("another frame rate", "rotation of another kind", "state in another order", "stand another way")
Change = Callable[[Episode], Episode]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> list[Episode]:
    """Five episodes of 60 to 64 steps: an arm, a square, that goes left as y grows and up as z does."""
    root = tmp_path_factory.mktemp("arm")
    made = [_moving(hand_made(60 + seed, seed), seed) for seed in range(5)]
    write_by_hand(root, "arm", train=made)
    return [*RldsIndex.open(root, "arm", SPEC).episodes]


def _moving(features: dict, seed: int) -> dict:
    steps, rng = len(features["steps/action"]), np.random.default_rng(seed)
    y, z = (np.cumsum(rng.normal(0, 0.03, (2, steps)), axis=1)).clip(-0.4, 0.4)
    fingers = 0.02 + 0.01 * np.sin(np.arange(steps))
    rotation = np.stack([np.full(steps, 3.3), np.zeros(steps), rng.normal(0, 0.01, steps)], 1)
    features["steps/observation/state"] = np.column_stack([y * 0, y, z, rotation, fingers, -fingers])
    pictures = []
    for at_y, at_z in zip(y, z, strict=True):
        picture = np.full((64, 64, 3), 90, np.uint8)
        top, left = round(28 - 60 * at_z), round(28 - 60 * at_y)
        picture[max(top, 0) : top + 8, max(left, 0) : left + 8] = 230
        pictures.append(encoded(picture, "PNG"))
    return features | {"steps/observation/image": pictures}


def found(root: Path, episodes: list[Episode], spec: DatasetSpec = SPEC, **written: int) -> dict[str, str]:
    """Problems of convention by name, with what was found and the remedy."""
    write_lerobot(root / "arm", episodes, **written)
    data = read_dataset(root / "arm", spec, 20, Console(quiet=True))
    problems = [problem for problem in find_problems(data) if problem.name.endswith(OTHER)]
    return {problem.name: f"{problem.found}. {problem.remedy}" for problem in problems}


def test_the_published_convention_has_no_problem(tmp_path: Path, episodes: list[Episode]) -> None:
    assert not found(tmp_path, episodes)


@pytest.mark.parametrize(
    ("turn", "told", "remedy"),
    [
        (Turn(180), "mirrored and upside down", "Say rotate_pictures: 180 in"),
        (Turn(0, mirror=True), "they are mirrored:", "Say mirror_pictures: true in"),
        (Turn(180, mirror=True), "they are upside down:", "Say rotate_pictures: 180 and mirror_pictures: true in"),
    ],
)
def test_pictures_that_stand_another_way(
    tmp_path: Path, episodes: list[Episode], turn: Turn, told: str, remedy: str
) -> None:
    turned = [replace(episode, turns={"full_image": turn}) for episode in episodes]
    said = found(tmp_path / "stored", turned)["pictures of full_image stand another way"]
    assert told in said and remedy in said
    back = replace(SPEC, turns={"full_image": turn})  # each of the three undoes itself
    assert not found(tmp_path / "said", turned, back)


def _euler(episode: Episode) -> Episode:
    state = np.array(episode.state)
    state[1::2, 3] -= 2 * np.pi
    return replace(episode, state=state)


def _fingers_first(episode: Episode) -> Episode:
    return replace(episode, state=np.roll(episode.state, 2, axis=1))


@pytest.mark.parametrize(
    ("change", "name", "told"),
    [
        (_euler, "rotation of another kind", r"state 3 to 5 (roll, pitch, yaw) jump by a full turn"),
        (_fingers_first, "state in another order", "state 0 and 1 mirror each other"),
    ],
)
def test_a_state_of_another_kind(tmp_path: Path, episodes: list[Episode], change: Change, name: str, told: str) -> None:
    assert told in found(tmp_path, [change(episode) for episode in episodes])[name]


def test_the_report_names_the_rate_and_the_dimensions(
    tmp_path: Path, episodes: list[Episode], capsys: pytest.CaptureFixture[str]
) -> None:
    write_lerobot(tmp_path / "arm", episodes, fps=10)
    output = str(tmp_path / "report")
    flags = [
        str(tmp_path / "arm"),
        "--robot",
        "libero",
        "--gripper",
        "libero",
        "--output_dir",
        output,
        "--pictures",
        "9",
    ]
    assert main(inspect_dataset_parser().parse_args(flags), Console()) == 1
    assert "another frame rate: the dataset says 10 frames per second" in capsys.readouterr().out
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| frames per second | 10 |" in text and "x, y, z, roll, pitch, yaw, gripper" in text
