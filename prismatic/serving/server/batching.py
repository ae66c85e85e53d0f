"""Requests that wait together are answered together: a queue, and the one thread that asks the policy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from prismatic.serving.server.payloads import PolicyRequest, PolicyResponse, Refusal

logger = logging.getLogger(__name__)

Answering = Callable[[Sequence[PolicyRequest]], Sequence[PolicyResponse]]


@dataclass(eq=False)
class _Waiting:
    request: PolicyRequest
    came: float
    answer: Future[PolicyResponse] = field(default_factory=Future)


class Batcher:
    """Collects requests and has them answered in one thread of its own.

    A batch begins when the thread is free and somebody waits. It takes what waits, and waits itself for more only where
    others may still ask: `batch_wait_s` from when its first request came, at most `max_batch_size` of them, and never
    two of one session, whose requests follow each other and are answered in order.

    Args:
        answering: `ServedPolicy.answer`.
        max_batch_size, batch_wait_s: as above.
        max_queue: how many may wait.
        askers: how many clients are connected, those that wait among them.
    """

    def __init__(
        self,
        answering: Answering,
        max_batch_size: int,
        batch_wait_s: float,
        max_queue: int,
        askers: Callable[[], int] = lambda: 2**31,
    ) -> None:
        self._answering, self._askers = answering, askers
        self._max_batch_size, self._batch_wait_s, self._max_queue = max_batch_size, batch_wait_s, max_queue
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._closing = self._hurrying = False
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, request: PolicyRequest) -> Future[PolicyResponse]:
        """A promise of the answer, whose timing has `queue` besides. What cannot be answered raises Refusal there.

        Raises Refusal when too many wait already (`too_many`), or none is taken any more (`shutdown`).
        """
        waiting = _Waiting(request, time.perf_counter())
        with self._changed:
            if self._closing:
                raise Refusal("shutdown", "the server is shutting down; ask again when it is back")
            if len(self._waiting) >= self._max_queue:
                raise Refusal(
                    "too_many",
                    f"{len(self._waiting)} requests wait already, as many as may (--max_queue); ask less often",
                )
            self._waiting.append(waiting)
            self._changed.notify_all()
        return waiting.answer

    def hurry(self) -> None:
        """From now on no request waits for others: none will come."""
        with self._changed:
            self._hurrying = True
            self._changed.notify_all()

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, answer those that wait, end the thread; whether it has ended in time."""
        with self._changed:
            self._closing = self._hurrying = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            # Nobody takes back what is being answered; what was taken back before is dropped.
            if wanted := [waiting for waiting in batch if waiting.answer.set_running_or_notify_cancel()]:
                self._answer(wanted)

    def _next_batch(self) -> list[_Waiting] | None:
        """The next requests; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            until = self._waiting[0].came + self._batch_wait_s
            while not self._is_full() and (left := until - time.perf_counter()) > 0:
                self._changed.wait(left)
            batch: list[_Waiting] = []
            sessions: set[str] = set()
            for waiting in self._waiting:
                request = waiting.request
                if len(batch) < self._max_batch_size and request.session not in sessions:
                    batch.append(waiting)
                    sessions |= {request.session} if request.remembers else set()
            taken = {id(waiting) for waiting in batch}
            self._waiting = [waiting for waiting in self._waiting if id(waiting) not in taken]
            return batch

    def _is_full(self) -> bool:
        return self._hurrying or len(self._waiting) >= min(self._max_batch_size, self._askers())

    def _answer(self, batch: list[_Waiting]) -> None:
        taken = time.perf_counter()
        try:
            answers = self._answering([waiting.request for waiting in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(_refusal(error))
                return
            # One of them did it: the others are answered as if it had not been there.
            for waiting in batch:
                self._answer([waiting])
            return
        for waiting, answer in zip(batch, answers, strict=True):
            queued = round(1000 * (taken - waiting.came), 3)
            waiting.answer.set_result(replace(answer, timing={"queue": queued, **answer.timing}))


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    logger.error("a request could not be answered", exc_info=error)
    return Refusal("policy", f"the policy broke ({type(error).__name__}); the server's log says more")
