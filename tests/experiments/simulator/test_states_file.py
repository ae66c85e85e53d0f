"""Initial states from a file as OpenVLA-OFT writes it, and what is said about files that are not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.evaluation.plan import make_plan
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.simulator.states_file import read_initial_states
from experiments.robot.libero.simulator.tasks import load_task

STOVE = load_task("libero_goal", 1)
KEY = "put_the_bowl_on_the_stove"


def entry(index: int = 0, success: object = True) -> dict[str, Any]:
    return {"success": success, "initial_state": STOVE.init_states[index].tolist()}


def test_failed_demonstrations_are_left_out_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "states.json"
    # Text order is not the order of the numbers.
    path.write_text(json.dumps({KEY: {f"demo_{i}": entry(i, i not in (1, 3)) for i in (10, 2, 0, 1, 3, 4)}}))
    states = read_initial_states(str(path), STOVE)
    assert list(states) == [0, 2, 4, 10]
    np.testing.assert_array_equal(states[10], STOVE.init_states[10])
    flags: dict[str, Any] = {"task_suite_name": "libero_goal", "task_ids": "1", "control": "blank_images"}
    config = EvaluationConfig("x", initial_states_path=str(path), num_trials_per_task=5, **flags)
    (starts,) = make_plan(config).starts
    assert [start.initial_state for start in starts] == [0, 2, 4]
    path.write_text(json.dumps({KEY: {"demo_0": entry(0, False), "demo_7": entry(7)}}))
    with pytest.raises(ValueError, match="no successful entry of task 1 before demo_5; it has .7."):
        make_plan(config)


def test_a_perturbed_task_is_found_by_its_published_sentence(tmp_path: Path) -> None:
    task = load_task("libero_goal_lan", 1)
    assert task.language == "place the bowl on the stove"
    path = tmp_path / "states.json"
    path.write_text(json.dumps({KEY: {"demo_0": entry()}}))
    assert list(read_initial_states(str(path), task)) == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list; expected"),
        ({"put_the_bowl_on_the_plate": {}}, "has no task 'put_the_bowl_on_the_stove'; it has: put_the_bowl_on_the_pl"),
        ({KEY: [1]}, "expected entries demo_0, demo_1"),
        ({KEY: {"first": entry()}}, "first: expected a name such as demo_0"),
        ({KEY: {"demo_0": {"initial_state": [1.0]}}}, 'demo_0: expected {"success": true or false'),
        ({KEY: {"demo_0": entry(0, "yes")}}, 'demo_0: expected {"success": true or false'),
        ({KEY: {"demo_0": {"success": True, "initial_state": ["a"]}}}, "holds something that is no number"),
        (
            {KEY: {"demo_0": {"success": True, "initial_state": [0.0] * 110}}},
            r"shape \(110,\); this task's states",
        ),
        ({KEY: {"demo_0": {"success": True, "initial_state": [float("nan")] * 79}}}, "79 finite numbers"),
        ({KEY: {"demo_0": entry(0, False)}}, "nothing to start from"),
        ({KEY: {"demo_1": entry(), "demo_01": entry(1)}}, "demo_1 and demo_01 are both number 1"),
        ({KEY: {"demo_01": entry(0, False), "demo_1": entry(1)}}, "demo_01 and demo_1 are both number 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "states.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_initial_states(str(path), STOVE)
