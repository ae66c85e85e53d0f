"""The flags of rollouts while a policy is trained."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.robot.libero.settings.suite_names import SUITES


@dataclass
class RolloutFlags:
    """Short rollouts of the policy in LIBERO every so many steps of its training."""

    # Rollouts in LIBERO while training
    rollout_freq: int = 0  # steps between them, in which training waits; 0: none
    rollout_suite: str | None = None  # of the tasks; None: the one that the dataset's name begins with
    rollout_tasks: str | None = None  # like 1,4 or 0-4; None: all of the suite
    rollout_states: str = "0"  # initial states of each task, like 0-1
    rollout_resolution: int = 256  # side of the rendered pictures in pixels, as the data's
    rollout_renderer: str = "robosuite"  # robosuite or fast, as the data was drawn
    rollout_envs: int | None = None  # simulator processes, beside the training; None: as many as cores and memory allow


def suite_of_dataset(name: str) -> str | None:
    """The LIBERO suite that a dataset's name begins with: `libero_goal_no_noops` -> `libero_goal`; None: of none."""
    found = [suite for suite in SUITES if name == suite or name.startswith(f"{suite}_")]
    return max(found, key=len, default=None)
