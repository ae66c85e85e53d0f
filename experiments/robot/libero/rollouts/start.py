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
    """Where a rollout begins and what the policy is asked to do.

    Args:
        instruction: The sentence; under the control `swapped_instruction` those of `other`.
        initial_state: Index into the task's initial states.
        trial: Counts the rollouts of one task.
        seed: Of the simulator's reset.
        displacement: Moves objects away from their standard places.
        state: Takes the place of the task's own initial state (S,).
        other: The task whose instruction is given instead, so that its goal is watched too.
        max_steps: Control steps after which the rollout has failed, where the evaluation's own number is not lower.
    """

    task: LiberoTask
    instruction: str
    initial_state: int
    trial: int
    seed: int
    displacement: Displacement | None = None
    state: NDArray[np.float64] | None = None
    other: LiberoTask | None = None
    max_steps: int | None = None

    @property
    def key(self) -> tuple[str, int, int, int]:
        """As `EpisodeRecord.key`."""
        repetition = 0 if self.displacement is None else self.displacement.trial
        return self.task.suite, self.task.index, self.initial_state, repetition


def start_text(record: EpisodeRecord) -> str:
    """`initial state 30, trial 0 · control: blank images`; with another task's instruction also the own task."""
    text = f"initial state {record.initial_state}, trial {record.trial}"
    if record.control != "none":
        text += f" · control: {record.control.replace('_', ' ')}"
    if record.other_task is not None:
        text += f", own task: {record.task_name.replace('_', ' ')}"
    return text
