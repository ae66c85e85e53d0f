"""A stored demonstration once more in the simulator, without the steps in which nothing is to move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from experiments.robot.libero.demonstrations.demonstration import MIN_SEGMENT, Recorder, Recording
from experiments.robot.libero.demonstrations.hdf5_files import StoredDemonstration, fixture_poses
from experiments.robot.libero.simulator.environment import SETTLE_ACTION, LiberoEnvironment
from prismatic.report.data import counted

STILL_ARM = 1e-4
"""An arm's command (6,) with a smaller norm moves nothing (OpenVLA-OFT's threshold)."""
STILL_FINGERS_M = 1e-4
"""Fingers that moved less in a step have arrived: on their way they move up to 5 mm a step, then they creep 0.04 mm."""


class ReplayFailed(RuntimeError):
    """A demonstration that cannot be kept; the message says why."""


@dataclass(frozen=True)
class Replayed:
    """A successful replay, and how many steps were left out of it."""

    recording: Recording
    dropped: int


def is_noop(action: ArrayLike, last_gripper: float, gripper_rests: bool) -> bool:
    """Whether a step moves nothing: the arm stands still, the gripper's command is the last, and has been carried out.

    OpenVLA-OFT asks for the first two and means to keep the steps in which the robot stands still while the gripper
    closes or opens; but that takes about ten steps, and from the second on their commands are equal. So the third.

    Args:
        action: (7,) in the simulator's convention, of whose gripper only the sign is executed.
        last_gripper: the gripper's command that was executed last.
        gripper_rests: whether its fingers have arrived where that command led them: at its ends, or at an object.
    """
    action = np.asarray(action, dtype=np.float64)
    stands = np.linalg.norm(action[:6]) < STILL_ARM
    return bool(stands and np.sign(action[6]) == np.sign(last_gripper) and gripper_rests)


def replay(environment: LiberoEnvironment, demonstration: StoredDemonstration, drop_noops: bool) -> Replayed:
    """Executes a demonstration from its first state, after settling, with the fixtures where they stood.

    Raises:
        ReplayFailed: when the goal does not hold at the end, or next to nothing is left.
        SimulationUnstable: when the simulation goes astray.
    """
    environment.reset(demonstration.initial_state, fixtures=fixture_poses(demonstration))
    recorder, holds, dropped = Recorder(environment), False, 0
    last_gripper, fingers, moved = SETTLE_ACTION[6], environment.state()[6:], 0.0
    for action in demonstration.actions:
        rests = environment.gripper_commanded() and moved < STILL_FINGERS_M
        if drop_noops and is_noop(action, last_gripper, rests):
            dropped += 1
            continue
        holds = recorder.step(action, wanted=True)
        last_gripper, before, fingers = action[6], fingers, environment.state()[6:]
        moved = float(np.abs(fingers - before).max())
    if recorder.steps < MIN_SEGMENT:
        raise ReplayFailed(f"only {counted(recorder.steps, 'step')} are left of it, and {MIN_SEGMENT} are needed")
    if not holds:
        raise ReplayFailed("the goal did not hold at its end")
    return Replayed(recorder.finish(), dropped)
