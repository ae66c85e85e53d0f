"""Limits of the known robots, and what makes each of them stand still."""

import dataclasses

import numpy as np
import pytest

from prismatic.serving.action_limits import ActionLimits, hold_action
from prismatic.vla.robots import ALOHA, BRIDGE, LIBERO, ROBOTS, Control, RobotSpec


def test_libero_s_deltas_are_cut_where_its_controller_cuts_them() -> None:
    action = np.array([0.5, -1.0, 1.0000000001, 1.2, -7.0, 0.0, 1.3])
    cut, limited = ActionLimits(LIBERO).apply(action, np.zeros(7))
    assert cut.tolist() == [0.5, -1, 1, 1, -1, 0, 1.3] and limited == (3, 4), "rounding is no excess"


def test_aloha_s_arms_turn_at_their_joints_speed_and_stay_in_their_range() -> None:
    limits, still = ActionLimits(ALOHA), np.zeros(14)
    far = np.full(14, 3.0)
    cut, limited = limits.apply(far, still)
    step = 3.14159 / 25  # radians in a control step
    assert limited == tuple(d for d in range(14) if d not in (6, 13)), "grippers go where they are sent"
    np.testing.assert_allclose(cut, [3.0 if d in (6, 13) else step for d in range(14)])
    now = still
    for _ in range(40):
        now, _ = limits.apply(far, now)
    np.testing.assert_allclose(now[[1, 2, 4]], [1.25664, 1.6057, 2.23402])


def test_a_joint_outside_its_range_comes_back_as_fast_as_it_may() -> None:
    robot = RobotSpec("arm", action_dim=1, control=Control("absolute", bounds=((-1.0, 1.0),), max_change=(0.2,)))
    cut, limited = ActionLimits(robot).apply(np.array([1.4]), np.array([1.5]))
    assert limited == (0,) and cut[0] == pytest.approx(1.3)


def test_every_known_robot_has_limits_that_fit_it_and_can_be_held() -> None:
    for robot in ROBOTS.values():
        ActionLimits(robot)
        state = {"state": np.linspace(0.1, 0.2, robot.proprio_dim)}
        assert hold_action(robot, None, state).shape == (robot.action_dim,)


def test_to_hold_is_zeros_with_the_grippers_kept_or_the_last_command() -> None:
    last = np.arange(1.0, 8.0)
    assert hold_action(LIBERO, last, {}).tolist() == [0] * 6 + [7]
    assert hold_action(LIBERO, None, {}).tolist() == [0] * 6 + [0.5], "which moves no finger"
    measured = {"state": np.arange(0.1, 0.75, 0.1)}
    np.testing.assert_allclose(hold_action(BRIDGE, None, measured), [0] * 6 + [0.7])
    last = np.arange(14.0)
    assert hold_action(ALOHA, last, {"state": np.ones(14)}).tolist() == last.tolist()
    assert hold_action(ALOHA, None, {"state": np.ones(14)}).tolist() == [1] * 14
    for seen, words in (({}, "got none"), ({"state": np.ones(8)}, r"of shape \(8,\)")):
        with pytest.raises(ValueError, match=f"expected a state 'state' of 14 numbers, {words}|got one {words}"):
            hold_action(ALOHA, None, seen)


def test_grippers_beyond_the_action_are_refused() -> None:
    robot = dataclasses.replace(LIBERO, control=Control("delta", grippers=(7,)))
    with pytest.raises(ValueError, match=r"grippers \(7,\); its actions have 7 dimensions"):
        ActionLimits(robot)
