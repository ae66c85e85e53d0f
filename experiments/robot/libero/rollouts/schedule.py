"""Which start is rolled out next, by whom, and how often a start is tried again."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.start import Start

logger = logging.getLogger(__name__)


class Schedule:
    """The starts that are still to be rolled out.

    A worker stays with its task as long as that has starts, since building another task's simulator takes seconds; then
    it takes the task with the most starts left, rather one that nobody else works on.

    Args:
        starts: in order, one list per task.
        max_attempts: how often a start is begun at most, when workers die or rollouts end with an error.
    """

    def __init__(self, starts: Iterable[Sequence[Start]], max_attempts: int = 3) -> None:
        self._waiting = [deque(task) for task in starts]
        self._queue_of = {start.key: number for number, task in enumerate(self._waiting) for start in task}
        self._working: Counter[int] = Counter()
        self._attempts: Counter[tuple[str, int, int, int]] = Counter()
        self.max_attempts = max_attempts

    @property
    def is_done(self) -> bool:
        """Whether no start is waiting or under way."""
        return not any(self._waiting) and not self._working.total()

    def take(self, previous: Start | None = None) -> Start | None:
        """The next start for a worker whose simulator is that of `previous`; None when none is waiting."""
        queues = [number for number, queue in enumerate(self._waiting) if queue]
        if not queues:
            return None
        own = None if previous is None else self._queue_of[previous.key]
        number = max(queues, key=lambda n: (n == own, not self._working[n], len(self._waiting[n]), -n))
        start = self._waiting[number].popleft()
        self._working[number] += 1
        self._attempts[start.key] += 1
        return start

    def settle(self, start: Start, record: EpisodeRecord) -> bool:
        """A start that was taken has ended with this record. Returns whether that stands.

        An invalid record says nothing about the policy: its start is put back, until it has been tried often enough.
        """
        queue, attempts = self._queue_of[start.key], self._attempts[start.key]
        self._working[queue] -= 1
        record.attempts = attempts
        again = record.invalid is not None and attempts < self.max_attempts
        if record.invalid is not None:
            reason = record.invalid.strip().splitlines()[-1]
            where = f"task {start.task.index}, initial state {start.initial_state}, attempt {attempts}"
            logger.warning("%s: %s; the rollout is %s", where, reason, "repeated" if again else "invalid")
        if again:
            self._waiting[queue].appendleft(start)
        return not again
