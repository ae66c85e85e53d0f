"""Which start is rolled out next, by whom, and how often a start is tried again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from experiments.robot.libero.rollout import Start


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

    def finish(self, start: Start) -> None:
        """A start that was taken has its outcome."""
        self._working[self._queue_of[start.key]] -= 1

    def try_again(self, start: Start) -> bool:
        """Put back a start whose rollout said nothing about the policy; False when it has been tried often enough."""
        self.finish(start)
        if self._attempts[start.key] >= self.max_attempts:
            return False
        self._waiting[self._queue_of[start.key]].appendleft(start)
        return True

    def attempts(self, start: Start) -> int:
        """How often a start has been begun."""
        return self._attempts[start.key]
