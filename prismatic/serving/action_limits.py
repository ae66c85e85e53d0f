"""Limits on what a robot is sent, per dimension, and what makes it stand still: both as its `Control` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismatic.vla.robots import Control, RobotSpec

Values = NDArray[np.float64]

_ROUNDING = 1e-9
"""What is beyond a limit by less is cut without being called so."""


def control_of(robot: RobotSpec) -> Control:
    """How the robot executes actions.

    Raises:
        ValueError: for a robot that does not say, or whose limits are not one for each dimension of its actions.
    """
    control = robot.control
    if control is None:
        raise ValueError(
            f"robot {robot.name!r} does not say how it executes actions; give its RobotSpec a `control`, for example "
            "Control('delta', grippers=(6,))"
        )
    for name in ("bounds", "max_change"):
        limits = getattr(control, name)
        if limits and len(limits) != robot.action_dim:
            raise ValueError(
                f"robot {robot.name!r} has {len(limits)} {name} for actions of {robot.action_dim} dimensions; "
                "expected one for each, or none"
            )
    if any(gripper >= robot.action_dim for gripper in control.grippers):
        raise ValueError(
            f"robot {robot.name!r} has grippers {control.grippers}; its actions have {robot.action_dim} dimensions"
        )
    return control


class ActionLimits:
    """Cuts actions to the robot's bounds, and to its largest change from the command before.

    Args:
        robot: whose `control` has the limits.

    Raises:
        ValueError: as `control_of`.
    """

    def __init__(self, robot: RobotSpec) -> None:
        control = control_of(robot)
        pairs = control.bounds or (None,) * robot.action_dim
        changes = control.max_change or (None,) * robot.action_dim
        self._low = np.array([-np.inf if pair is None else pair[0] for pair in pairs])
        self._high = np.array([np.inf if pair is None else pair[1] for pair in pairs])
        self._change = np.array([np.inf if change is None else change for change in changes])

    def apply(self, action: Values, previous: Values) -> tuple[Values, tuple[int, ...]]:
        """Cut one action (action_dim,), all finite.

        Args:
            action: as the policy wants it.
            previous: what the robot was sent one control step before, or where it stands.

        Returns:
            The action within the limits, and the dimensions in which it was not. Where both limits cannot be kept, as
            for a joint that stands outside its bounds, it changes towards them as fast as it may.
        """
        inside = np.clip(action, self._low, self._high)
        inside = np.clip(inside, previous - self._change, previous + self._change)
        beyond = np.abs(inside - action) > _ROUNDING
        return inside, tuple(int(dimension) for dimension in np.flatnonzero(beyond))


def hold_action(robot: RobotSpec, last: Values | None, observation: Mapping[str, Any]) -> Values:
    """The action (action_dim,) that makes the robot stay as it is. It is never a way to some other pose.

    Of a robot whose actions are deltas: zeros, and each gripper as it was last commanded. Of one with absolute actions:
    the last command. One that was never commanded stays where it measures itself to be.

    Args:
        robot: its `control` says which of both it is.
        last: the last command, (action_dim,); None before the first.
        observation: with the robot's state.

    Raises:
        ValueError: for a robot that was never commanded and whose state does not have the dimensions of its actions.
    """
    control = control_of(robot)
    held = np.zeros(robot.action_dim)
    kept = list(control.grippers) if control.kind == "delta" else list(range(robot.action_dim))
    if last is not None:
        held[kept] = last[kept]
    elif control.gripper_at_rest is not None and kept == list(control.grippers):
        held[kept] = control.gripper_at_rest
    elif kept:
        held[kept] = _measured(robot, observation)[kept]
    return held


def _measured(robot: RobotSpec, observation: Mapping[str, Any]) -> Values:
    state = observation.get(robot.state_key)
    measured = None if state is None else np.asarray(state, np.float64)
    if measured is None or measured.shape != (robot.action_dim,):
        found = "none" if measured is None else f"one of shape {measured.shape}"
        raise ValueError(
            f"robot {robot.name!r} was never commanded and has to be held where it is: expected a state "
            f"{robot.state_key!r} of {robot.action_dim} numbers, got {found}; give the runner its `last_command`"
        )
    return measured
