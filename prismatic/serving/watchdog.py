"""A watchdog: when actions stop coming the robot holds, and goes on only after somebody has armed it again."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trip:
    """Why and when a watchdog stopped the robot, by its clock in seconds."""

    reason: str
    time: float


class Watchdog:
    """Watches that something happens often enough.

    It has no thread: whoever runs the robot's control loop calls `check` once per control step and holds while that
    returns a `Trip`. `trip` and `rearm` may be called from any thread.

    Args:
        limit_s: the longest time between two calls of `feed`. It counts from the first `check` on.
        clock: seconds, which only grow; the simulation's, where that is the robot.

    Raises:
        ValueError: for a limit that is not above 0.

    Attributes:
        history: every trip so far, in order.
        armed_at: when it was last re-armed behind a trip, by its clock; minus infinity before that.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not limit_s > 0:
            raise ValueError(f"a watchdog's limit of {limit_s} seconds: expected more than 0")
        self.limit_s = limit_s
        self.history: list[Trip] = []
        self.armed_at = -math.inf
        self._clock = clock
        self._lock = threading.Lock()
        self._fed: float | None = None
        self._tripped: Trip | None = None

    @property
    def tripped(self) -> Trip | None:
        """Why the robot has to hold now; None while it may move."""
        return self._tripped

    def feed(self) -> None:
        """What is watched has happened. Of no effect on a watchdog that has tripped."""
        with self._lock:
            self._fed = self._clock()

    def restart(self) -> None:
        """The limit counts anew, from the next `check` on. A watchdog that has tripped stays so."""
        with self._lock:
            self._fed = None

    def check(self, missing: str = "nothing happened") -> Trip | None:
        """Trip when the limit has passed, saying what was missing; returns why the robot has to hold, or None."""
        with self._lock:
            now = self._clock()
            if self._fed is None:
                self._fed = now
            if self._tripped is None and now - self._fed > self.limit_s:
                self._trip(f"no action for {now - self._fed:.2f} s, limit {self.limit_s:g} s: {missing}", now)
            return self._tripped

    def trip(self, reason: str) -> None:
        """Stop the robot for another reason, as an emergency stop does; the first reason stays."""
        with self._lock:
            if self._tripped is None:
                self._trip(reason, self._clock())

    def rearm(self) -> None:
        """Let the robot go on; the limit counts from now."""
        with self._lock:
            now = self._clock()
            if self._tripped is not None:
                logger.warning("re-armed, %.1f s after: %s", now - self._tripped.time, self._tripped.reason)
                self.armed_at = now
            self._tripped, self._fed = None, now

    def _trip(self, reason: str, now: float) -> None:
        self._tripped = Trip(reason, now)
        self.history.append(self._tripped)
        logger.warning("the robot holds until it is re-armed: %s", reason)
