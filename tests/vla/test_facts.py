"""Prompt, action tokens, robots and normalisation against recorded ids and plain arithmetic."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.normalization import fit_statistics, normalize, unnormalize
from prismatic.vla.prompt import TokenIds, format_prompt, prompt_ids
from prismatic.vla.robots import ALOHA, LIBERO, ROBOTS, Control, RobotSpec, get_robot

CASES = json.loads((Path(__file__).parents[1] / "data" / "llama_tokenization.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["instruction"][:20])
def test_ids_equal_the_real_llama_tokenizers(case):
    ids = TokenIds()
    assert format_prompt(case["instruction"].upper()) == case["prompt"]
    recorded = {case["prompt"]: case["prompt_ids"]}
    actions = ActionTokenizer(ids.action_end).encode(np.array(case["actions"])).reshape(-1).tolist()
    assert actions == case["action_bins_ids"]
    assert [*prompt_ids(recorded.__getitem__, case["instruction"], ids), *actions, ids.stop] == case["train_ids"]
    without_bos = {case["prompt"]: case["prompt_ids"][1:]}
    assert prompt_ids(without_bos.__getitem__, case["instruction"], ids)[0] == ids.bos


def test_action_tokens_round_trip_within_a_bin():
    tokenizer = ActionTokenizer()
    actions = np.linspace(-1.2, 1.2, 1001)
    decoded = tokenizer.decode(tokenizer.encode(actions))
    assert np.abs(decoded - np.clip(actions, -1, 1)).max() <= 1 / 255 + 1e-9


@pytest.mark.parametrize("kind", [str, str.encode, np.str_, lambda s: np.bytes_(s.encode()), np.array, bytearray])
def test_sentences_come_as_text_or_bytes(kind):
    sentence = "Put the Bowl on the plate" if kind is bytearray else "Stelle die Schüssel auf den Teller"
    words = bytearray(sentence.encode()) if kind is bytearray else kind(sentence)
    assert format_prompt(words) == f"In: What action should the robot take to {sentence.lower()}?\nOut:"


def test_zero_bytes_are_no_words():
    assert format_prompt(b"go\0\0\0") == format_prompt("\0go") == format_prompt("go")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("\0" * 12, "instruction is empty; expected a sentence"),
        ("  ", "instruction is empty; expected a sentence"),
        (b"", "instruction is empty"),
        (None, "instruction is None, a NoneType; expected a sentence"),
        (7, "is 7, a int"),
        (["open", "the"], "a list; expected a sentence"),
        (np.array(["open", "the"]), "a ndarray; expected"),
        (b"\xff\xfe", r"b'\\xff\\xfe' is not UTF-8"),
    ],
)
def test_what_is_no_sentence_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        format_prompt(words)


def test_statistics_equal_numpy():
    rng = np.random.default_rng(0)
    actions, states = rng.normal(size=(101, 7)), rng.normal(size=(101, 8))
    statistics = fit_statistics(actions, states, LIBERO.action_mask, 4)
    assert statistics["action"]["q99"] == pytest.approx([sorted(column)[99] for column in actions.T])
    assert statistics["proprio"]["std"] == pytest.approx(np.sqrt(((states - states.mean(0)) ** 2).mean(0)))
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (101, 4)
    assert statistics["action"]["mask"] == [True] * 6 + [False] and "mask" not in statistics["proprio"]


@pytest.mark.parametrize("kind", ["bounds_q99", "bounds"])
def test_normalise_and_back(kind):
    rng = np.random.default_rng(1)
    actions = rng.normal(size=(200, 7))
    actions[:, 2] = 0.25
    actions[:, 6] = 1.0 if kind == "bounds" else actions[:, 6]  # a gripper that stays open is open
    statistics = fit_statistics(actions, None, LIBERO.action_mask, 1)["action"]
    low, high = ("q01", "q99") if kind == "bounds_q99" else ("min", "max")
    scaled = normalize(actions, statistics, kind)
    for dimension in (0, 1, 3):
        a, b = statistics[low][dimension], statistics[high][dimension]
        expected = np.clip(2 * (actions[:, dimension] - a) / (b - a) - 1, -1, 1)
        np.testing.assert_allclose(scaled[:, dimension], expected, atol=1e-6)
    assert (scaled[:, 2] == 0).all(), "a dimension that never varies says nothing"
    np.testing.assert_allclose(scaled[:, 6], actions[:, 6], rtol=1e-6)
    inside = np.abs(scaled[:, :2]).max(1) < 1
    np.testing.assert_allclose(unnormalize(scaled, statistics, kind)[inside, :2], actions[inside, :2], atol=1e-6)


def test_no_mask_and_null_mean_the_same():
    statistics = fit_statistics(np.random.default_rng(0).uniform(-3, 5, (50, 7)), None, [True] * 7, 2)["action"]
    actions = np.linspace(-2, 4, 14).reshape(2, 7)
    expected = normalize(actions, statistics), unnormalize(actions, statistics)
    for other in ({**statistics, "mask": None}, {k: v for k, v in statistics.items() if k != "mask"}):
        np.testing.assert_array_equal(normalize(actions, other), expected[0])
        np.testing.assert_array_equal(unnormalize(actions, other), expected[1])


def test_missing_quantiles_are_named():
    with pytest.raises(ValueError, match=r"lack \['q01', 'q99'\]"):
        normalize(np.zeros(2), {"min": [0, 0], "max": [1, 1]})


def test_robots_survive_json():
    for robot in ROBOTS.values():
        assert RobotSpec.from_json(json.loads(json.dumps(robot.to_json()))) == robot
    with pytest.raises(ValueError, match="unknown robot 'spot'; known: aloha, bridge, libero"):
        get_robot("spot")
    with pytest.raises(ValueError, match=r"unknown keys \['wheels'\]"):
        RobotSpec.from_json({"name": "x", "wheels": 4})


def test_how_a_known_robot_is_controlled_is_not_stored():
    """A checkpoint's `config.json` is as it was, and older ones get the limits that are known now."""
    stored = {
        "name": "libero", "cameras": ["full_image", "wrist_image"], "image_rotation_degrees": 180,
        "state_key": "state", "proprio_dim": 8, "action_dim": 7, "chunk_length": 8, "open_loop_steps": 8,
        "control_rate_hz": 20.0, "action_mask": [True] * 6 + [False], "normalization": "bounds_q99",
        "canonical_quaternion": False,
    }  # fmt: skip
    assert LIBERO.to_json() == stored
    assert RobotSpec.from_json(stored) == LIBERO and RobotSpec.from_json(stored).control == LIBERO.control
    assert all("control" not in robot.to_json() for robot in ROBOTS.values())


def test_how_another_robot_is_controlled_is_stored():
    mine = dataclasses.replace(ALOHA, name="mine", control=dataclasses.replace(ALOHA.control, grippers=(6,)))
    slower = dataclasses.replace(LIBERO, control=Control("delta", (6,), bounds=((-0.5, 0.5),) * 6 + (None,)))
    for robot in (mine, slower, dataclasses.replace(LIBERO, control=None), RobotSpec("arm")):
        assert RobotSpec.from_json(json.loads(json.dumps(robot.to_json()))) == robot
    assert mine.to_json()["control"]["max_change"][6:8] == [None, 3.14159 / 25]


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"kind": "torque"}, "kind 'torque'; expected 'delta' or 'absolute'"),
        ({}, "expected a dictionary with a `kind`"),
        ({"kind": "delta", "speed": 1}, r"unknown keys \['speed'\]"),
        ({"kind": "delta", "bounds": [[1, -1]]}, "lowest, highest"),
        ({"kind": "delta", "bounds": [[0, float("nan")]]}, "finite numbers"),
        ({"kind": "delta", "max_change": [0]}, "above 0"),
        ({"kind": "delta", "grippers": [-1]}, "dimensions of an action"),
    ],
)
def test_controls_that_are_none(control, words):
    with pytest.raises(ValueError, match=words):
        RobotSpec.from_json({"name": "x", "control": control})
