"""Where a rollout begins: task, initial state, seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.simulator.tasks import LiberoTask
from experiments.robot.libero.simulator.wide_starts import Displacement


@dataclass(frozen=True)
class Start:
    """Where a rollout begins and what the policy is told.

    Args:
        instruction: The words; under the control `swapped_instruction` those of `other`.
        initial_state: Index into the task's initial states.
        trial: Counts the rollouts of one task.
        seed: Of the simulator's reset.
        displacement: Moves objects away from their standard places.
        state: Takes the place of the task's own initial state (S,).
        other: The task whose words are given instead, so that its goal is watched too.
    """

    task: LiberoTask
    instruction: str
    initial_state: int
    trial: int
    seed: int
    displacement: Displacement | None = None
    state: NDArray[np.float64] | None = None
    other: LiberoTask | None = None

    @property
    def key(self) -> tuple[str, int, int, int]:
        """As `EpisodeRecord.key`."""
        return self.task.suite, self.task.index, self.initial_state, self.trial


def start_words(record: EpisodeRecord) -> str:
    """`initial state 30, trial 0 · control: blank images`; where another task's words were given also the own task."""
    words = f"initial state {record.initial_state}, trial {record.trial}"
    if record.control != "none":
        words += f" · control: {record.control.replace('_', ' ')}"
    if record.other_task is not None:
        words += f", own task: {record.task_name.replace('_', ' ')}"
    return words
