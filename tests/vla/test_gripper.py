"""Conventions of the gripper, and what values of a whole dataset say of them."""

import re

import numpy as np
import pytest

from prismatic.vla.gripper import GRIPPERS, Gripper, unsaid_gripper


def mapped(gripper: str, *values: float) -> list[float]:
    actions = np.tile(np.arange(7.0), (len(values), 1))
    actions[:, 6] = values
    before = actions.copy()
    result = Gripper.parse(gripper)(actions)
    np.testing.assert_array_equal(actions, before, err_msg="the stored actions stay")
    np.testing.assert_array_equal(result[:, :6], before[:, :6])
    assert result.dtype == np.float32 and not np.signbit(result[:, 6]).any()
    return result[:, 6].tolist()


def test_every_convention_becomes_one_when_open() -> None:
    assert mapped("libero", -1, 1, 0.25, 0) == [1, 0, 0.75, 1]
    assert mapped("open1", 1, 0, 0.25, -0.01, 1.01) == [1, 0, 0.25, 0, 1]
    assert mapped("closed1", 1, 0, 0.25) == [0, 1, 0.75]
    assert mapped("width:0,0.08", 0.08, 0, 0.04, 0.081) == pytest.approx([1, 0, 0.5, 1])
    assert mapped("width:255,0", 0, 255, 51) == pytest.approx([1, 0, 0.8])
    assert mapped("width:-1,1", -1, 1, 0) == [0, 1, 0.5]


def test_liberos_values_are_the_published_formula_bit_for_bit() -> None:
    values = np.random.default_rng(0).uniform(-1.2, 1.2, 1000).astype(np.float32)
    actions = np.zeros((1000, 7), np.float32)
    actions[:, 6] = values
    np.testing.assert_array_equal(GRIPPERS["libero"](actions)[:, 6], 1.0 - np.clip(values, 0.0, 1.0))


@pytest.mark.parametrize(
    "text", ["open", "width", "width:0", "width:0,0", "width:0,x", "width:0,inf", "libero:0,1", ""]
)
def test_other_words_list_the_choices(text: str) -> None:
    with pytest.raises(ValueError, match=r"--gripper .*expected libero \(-1 open.*open1.*closed1.*width:CLOSED,OPEN"):
        Gripper.parse(text)


@pytest.mark.parametrize(
    ("gripper", "values"),
    [("libero", [-1, 0, 1]), ("open1", [0.02, 0.97]), ("closed1", [0, 1]), ("width:0,0.08", [0.081, 0.001])],
)
def test_values_that_reach_both_ends_pass(gripper: str, values: list[float]) -> None:
    assert Gripper.parse(gripper).check(np.array(values)) is None


@pytest.mark.parametrize(
    ("gripper", "values", "remedies"),
    [
        ("libero", [0, 1], ["--gripper open1 where 0 is closed", "--gripper closed1 where 1 is closed"]),
        ("open1", [-1, 1], ["--gripper libero where 1 is closed", "--gripper width:-1,1 where -1 is closed"]),
        ("open1", [0, 0.08], ["--gripper width:0,0.08 where 0 is closed", "--gripper width:0.08,0 where 0.08 is"]),
        ("closed1", [0, 0.5], ["--gripper width:0,0.5 where 0 is closed"]),
        ("width:0,0.08", [0, 0.1], ["--gripper width:0,0.1"]),
        ("libero", [-1, 0], ["--gripper width:-1,0 where -1 is closed"]),
    ],
)
def test_values_of_another_convention_are_refused_with_flags_to_copy(
    gripper: str, values: list[float], remedies: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"run from {min(values):g} to {max(values):g}; '{gripper}' means") as error:
        Gripper.parse(gripper).check(np.array(values))
    assert all(remedy in str(error.value) for remedy in remedies), str(error.value)


@pytest.mark.parametrize(
    ("gripper", "values", "words"),
    [
        ("libero", [-1, -1], "one position of the gripper's range only"),
        ("width:0,0.08", [0.02, 0.08], "run from 0.02 to 0.08.* a part of the gripper's range only"),
    ],
)
def test_a_gripper_that_never_moves_and_a_width_that_stays_inside_are_told(
    gripper: str, values: list[float], words: str
) -> None:
    told = Gripper.parse(gripper).check(np.array(values))
    assert told is not None and re.search(words, told), told


def test_an_unsaid_gripper_is_refused_with_flags_to_copy() -> None:
    actions = np.zeros((4, 7))
    with pytest.raises(ValueError, match="runs from 0 to 0. Pass --gripper with libero"):
        unsaid_gripper(actions)
    actions[:, 6] = [-1, 1, 1, -1]
    with pytest.raises(
        ValueError, match="from -1 to 1. Pass --gripper libero where 1 is closed or --gripper width:-1,1"
    ):
        unsaid_gripper(actions)
    actions[:, 6] = [0, 0.0813, 0.02, 0]
    with pytest.raises(ValueError, match="Pass --gripper width:0,0.0813 where 0 is closed or --gripper width:0.0813,0"):
        unsaid_gripper(actions)
