"""What a chunk runner tells: the command of each control step, and what it threw away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Source:
    """Where an action comes from.

    Attributes:
        chunk: number of the policy query, from 0.
        index: which of its chunk's actions.
        observed_at: when its observation was taken, in seconds of the runner's clock.
    """

    chunk: int
    index: int
    observed_at: float


@dataclass(frozen=True, eq=False)
class Action:
    """A command that comes from the policy.

    Attributes:
        values: (action_dim,), within the robot's limits.
        step: number of the control step, from 0.
        time: when it was given out.
        sources: the chunk that it is from; under ensembling all those it was made of, the oldest first.
        limited: dimensions in which the policy wanted more than the robot's limits allow.
    """

    values: NDArray[np.float64]
    step: int
    time: float
    sources: tuple[Source, ...]
    limited: tuple[int, ...] = ()

    @property
    def age_s(self) -> float:
        """How old the oldest observation is that it comes from."""
        return self.time - self.sources[0].observed_at


@dataclass(frozen=True, eq=False)
class Hold:
    """A command that makes the robot stay as it is.

    Attributes:
        values: (action_dim,), see `hold_action`.
        step: number of the control step, from 0.
        time: when it was given out.
        reason: why there is no action.
        needs_rearm: whether the robot goes on only after `ChunkRunner.rearm`.
    """

    values: NDArray[np.float64]
    step: int
    time: float
    reason: str
    needs_rearm: bool = False


@dataclass(frozen=True)
class Dropped:
    """Actions that came and were not executed.

    Attributes:
        chunk: number of the policy query.
        actions: the indices in its chunk; empty where the answer itself never came to be used.
        step: number of the control step.
        time: when they were dropped.
        reason: `late`: as many actions had been executed since the observation; `stale`: older than `max_age_s`;
            `stopped`: the watchdog had tripped; `failed` and what the policy raised or what was wrong with its answer.
    """

    chunk: int
    actions: range
    step: int
    time: float
    reason: str


Record = Action | Hold | Dropped
