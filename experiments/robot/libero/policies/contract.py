"""Whom a rollout queries: an agent takes observations and instructions and returns action chunks.

A rollout knows only this contract, so that it runs alike beside the policy, in a worker process at the other end of a
pipe, or against a server. Nothing here imports torch: worker processes stay small.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prismatic.vla.request import Blanking
from prismatic.vla.robots import RobotSpec

Observation = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PolicyQuery:
    """One call of the policy.

    Args:
        observation: the robot's camera keys, uint8 (H, W, 3), and its state (P,).
        instruction: the sentence.
        seed: of whatever is random about the actions (diffusion's starting noise, randomly chosen tokens), so that
            they do not depend on what else was asked, or when.
        suite: of the task, whose statistics scale state and actions where an agent has several.
        session: who asks, one episode after another; a policy with a memory keeps one for each. Empty: a query that
            stands for itself.
        number: how many queries came before it in its episode; with 0 another one begins.
        blanking: which kept tokens lose their content, for policies of this project; None: none.
    """

    observation: Observation
    instruction: str
    seed: int = 0
    suite: str = ""
    session: str = ""
    number: int = 0
    blanking: Blanking | None = None


@dataclass(frozen=True)
class ActionChunk:
    """What an agent returns for one policy query: the actions to come, and what led to them.

    Args:
        actions: (chunk, action_dim) in the robot's units; LIBERO's gripper is 1 = open, 0 = closed.
        kept: (V,) bool, the visual tokens that stayed; None where the agent does not say.
        picks: (V,) how many patch queries picked each visual token; None likewise.
        stage_ms: milliseconds per stage of the call that made this chunk (preprocessing, vision, pruner, llm, total).
        scores: (V,) the best score that any patch query gave each visual token; None where there are no scores.
        policy_ms: milliseconds that the policy itself took for the call that made this chunk, without any waiting for
            it; None where nobody has measured it.
        call_queries: how many policy queries that call had.
        blanked: (V,) bool, the kept tokens whose content was replaced; None where nobody asked for it.
    """

    actions: NDArray[np.floating[Any]]
    kept: NDArray[np.bool_] | None = None
    picks: NDArray[np.float32] | None = None
    stage_ms: dict[str, float] = field(default_factory=dict)
    scores: NDArray[np.float32] | None = None
    policy_ms: float | None = None
    call_queries: int = 1
    blanked: NDArray[np.bool_] | None = None


class Queryable(Protocol):
    """The part of an agent that a rollout needs."""

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        """One action chunk per policy query, in order."""
        ...


def timed_query(agent: Queryable, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
    """Query an agent in one call, and note in each action chunk how long the call took and how many queries it had.

    A chunk that says its time already keeps it: of a policy elsewhere, the process that calls it knows better.
    """
    began = time.perf_counter()
    chunks = agent.query(queries)
    took = round(1000 * (time.perf_counter() - began), 3)
    return [
        replace(chunk, policy_ms=took, call_queries=len(queries)) if chunk.policy_ms is None else chunk
        for chunk in chunks
    ]


class Agent(Queryable, Protocol):
    """A policy as an evaluation sees it.

    Attributes:
        robot: whose conventions its observations and actions follow.
        cameras: observation keys of the pictures that it reads, in order.
        center_crop: whether it sees the central part of the pictures only.
    """

    @property
    def robot(self) -> RobotSpec: ...
    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def center_crop(self) -> bool: ...

    def description(self) -> dict[str, Any]:
        """What it is, for results and reports, with a list `assumptions`."""
        ...

    def close(self) -> None:
        """Give back what it holds; it cannot be queried any more."""
        ...


def query_seed(seed: int, suite: str, task_index: int, initial_state: int, trial: int, query: int) -> int:
    """The seed of one policy query, a pure function of where it stands in the evaluation; below 2**32."""
    return zlib.crc32(repr((seed, suite, task_index, initial_state, trial, query)).encode())
