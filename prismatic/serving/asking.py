"""How a chunk runner asks its policy without waiting: in a thread, or in simulated time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

Observation = Mapping[str, Any]

MOST_UNANSWERED = 8
"""Requests at once to one policy, most of which nobody waits for any more."""


class Acting(Protocol):
    """What a runner asks: `PolicyClient`, or `Policy` in this process.

    If it also has `begin_episode()`, that is called at the beginning of each episode.
    """

    def act(self, observation: Any, instruction: str) -> ArrayLike:
        """One observation -> (chunk, action_dim) actions."""
        ...


class Pending(Protocol):
    """One request under way."""

    def wait(self, seconds: float) -> bool:
        """Whether its answer, or an error, has come; waits at most so long."""
        ...

    def result(self) -> ArrayLike:
        """The answer, once `wait` has said that it is there. Raises what the policy raised."""
        ...


@runtime_checkable
class Asker(Protocol):
    """Asks a policy."""

    def ask(self, observation: Observation, instruction: str) -> Pending:
        """Ask, and return at once."""
        ...


class _ThreadedAnswer:
    def __init__(self, call: Callable[[], ArrayLike], number: int) -> None:
        self._call, self._done = call, threading.Event()
        self._answer: ArrayLike | None = None
        self._error: Exception | None = None
        # A daemon: a policy that never answers must not keep the process.
        threading.Thread(target=self._run, name=f"policy query {number}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._answer = self._call()
        except Exception as error:
            self._error = error
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def result(self) -> ArrayLike:
        if self._error is not None:
            raise self._error
        assert self._answer is not None  # `wait` has said so
        return self._answer


class InThreads:
    """Asks in a thread per request, so that the robot's loop goes on.

    Args:
        policy: must stand several requests at once: one that nobody waits for any more may still be under way.
    """

    def __init__(self, policy: Acting) -> None:
        self._policy, self._asked = policy, 0
        self._under_way: list[_ThreadedAnswer] = []

    def ask(self, observation: Observation, instruction: str) -> Pending:
        """Ask about a copy, since the caller may overwrite its camera's buffers in the next control step.

        Raises:
            RuntimeError: while `MOST_UNANSWERED` requests are unanswered.
        """
        self._under_way = [pending for pending in self._under_way if not pending.wait(0)]
        if len(self._under_way) >= MOST_UNANSWERED:
            raise RuntimeError(f"{MOST_UNANSWERED} requests are unanswered; give the policy a shorter time-out")
        seen = {key: np.array(value) for key, value in observation.items()}
        self._asked += 1
        pending = _ThreadedAnswer(lambda: self._policy.act(seen, instruction), self._asked)
        self._under_way.append(pending)
        return pending


class _LateAnswer:
    def __init__(self, answer: ArrayLike | Exception, due: float, clock: Callable[[], float]) -> None:
        self._answer, self._due, self._clock = answer, due, clock

    def wait(self, _: float) -> bool:
        return self._clock() >= self._due - 1e-9

    def result(self) -> ArrayLike:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class InSimulatedTime:
    """Asks at once, and lets the answer arrive later by a clock that does not run meanwhile: everything is repeatable.

    Args:
        policy: how long it computes does not count.
        latency_s: from request to answer.
        clock: the simulation's seconds.
    """

    def __init__(self, policy: Acting, latency_s: float | Callable[[], float], clock: Callable[[], float]) -> None:
        self._policy, self._clock = policy, clock
        self._latency: Callable[[], float] = latency_s if callable(latency_s) else lambda: latency_s

    def ask(self, observation: Observation, instruction: str) -> Pending:
        """Ask."""
        answer: ArrayLike | Exception
        try:
            answer = self._policy.act(dict(observation), instruction)
        except Exception as error:
            answer = error
        return _LateAnswer(answer, self._clock() + self._latency(), self._clock)
