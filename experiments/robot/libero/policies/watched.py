"""A policy that is watched: one that fails at every query, or returns from none, ends the evaluation."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from experiments.robot.libero.policies.contract import ActionChunk, Agent, PolicyQuery
from prismatic.command_status import UNUSABLE, print_error

_POLL_SECONDS = 1.0


class PolicyLost(RuntimeError):
    """The policy failed so many times in a row that it will not come back: its server is gone, its GPU in error."""


class WatchedPolicy:
    """Passes policy queries on, and counts how many failed in a row.

    Args:
        agent: the policy.
        max_failures: so many in a row raise `PolicyLost`.
    """

    def __init__(self, agent: Agent, max_failures: int) -> None:
        self._agent = agent
        self._max_failures = max_failures
        self.failures = 0
        self.pending_since: float | None = None
        self.pending_queries = 0

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        """As the agent's.

        Raises:
            PolicyLost: instead of the agent's error, when there were too many.
        """
        self.pending_queries = len(queries)
        self.pending_since = time.monotonic()
        try:
            chunks = self._agent.query(queries)
        except Exception as error:
            # A batch that failed is tried one by one: only those say something about the policy.
            self.failures += len(queries) == 1
            if self.failures >= self._max_failures:
                last = (str(error).strip() or type(error).__name__).splitlines()[-1]
                raise PolicyLost(
                    f"the policy failed at {self.failures} queries in a row; the last error: {last}"
                ) from error
            raise
        finally:
            self.pending_since = None
        self.failures = 0
        return chunks


@contextmanager
def watchdog(
    policy: WatchedPolicy, timeout_s: float, hint: str, end: Callable[[int], object] = os._exit
) -> Iterator[None]:
    """Within the block, end the process with one line where a query takes longer than `timeout_s` (times its batch).

    A call that hangs inside a driver can be neither interrupted nor waited for, hence the hard end: what is on the disk
    by then stays. Time during which the process itself was stopped does not count.

    Args:
        hint: how to go on.
    """
    done = threading.Event()

    def watch() -> None:
        waited, query, before = 0.0, None, time.monotonic()
        while not done.wait(min(_POLL_SECONDS, timeout_s / 4)):
            now = time.monotonic()
            passed, before = min(now - before, 2 * _POLL_SECONDS), now
            pending = policy.pending_since
            waited, query = (waited + passed if pending == query and pending is not None else 0.0), pending
            if waited > timeout_s * max(1, policy.pending_queries):
                print_error(
                    f"the policy has not returned for {waited:.0f} seconds (--policy_timeout_s {timeout_s:g}), "
                    f"and cannot be interrupted; {hint}"
                )
                end(UNUSABLE)
                return

    thread = threading.Thread(target=watch, name="policy watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
