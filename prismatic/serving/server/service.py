"""What all routes share: one request's way from its bytes to its answer, who is connected, and how it all ends."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from prismatic.serving.server.batching import Batcher
from prismatic.serving.server.events import Answered, ConnectionChanged, Refused, Watcher
from prismatic.serving.server.metrics import Metrics
from prismatic.serving.server.payloads import PolicyRequest, PolicyResponse, Refusal
from prismatic.serving.server.served import ServedPolicy
from prismatic.serving.server.watching import Watching
from prismatic.serving.settings import ServerConfig

logger = logging.getLogger(__name__)

_LARGE = 1_000_000
"""Bytes of a message from which on it is read in a thread, so that others are not kept waiting."""
_TICK_S = 0.02


@dataclass(frozen=True)
class Exchange:
    """One request, whatever becomes of it.

    Attributes:
        protocol: `websocket` or `http`.
        connection: who asks.
        request_id: in the reply, the logs and what watchers are told.
        began: when it had come, by `time.perf_counter`.
        time: the same in seconds since 1970.
    """

    protocol: str
    connection: str
    request_id: str = field(default_factory=lambda: secrets.token_hex(6))
    began: float = field(default_factory=time.perf_counter)
    time: float = field(default_factory=time.time)


class Pace:
    """How often one client may ask: a bucket that `rate` tokens a second fill and every request takes one from."""

    def __init__(self, rate: float) -> None:
        self._rate, self._tokens, self._seen = rate, max(rate, 1.0), time.monotonic()

    def take(self) -> None:
        """Raises Refusal (`too_many`) where the client asks too often."""
        now = time.monotonic()
        self._tokens = min(self._tokens + (now - self._seen) * self._rate, max(self._rate, 1.0))
        self._seen = now
        if self._tokens < 1:
            raise Refusal("too_many", f"more than {self._rate:g} requests a second (--max_rate); ask less often")
        self._tokens -= 1


class Service:
    """A served policy with its queue, watchers and counters.

    Its methods are for the event loop, but for `start` and `close`.
    """

    def __init__(self, served: ServedPolicy, config: ServerConfig, watchers: Sequence[Watcher] = ()) -> None:
        self.served, self.config = served, config
        self.batcher = Batcher(
            served.answer, config.max_batch_size, config.batch_wait_ms / 1000, config.max_queue, self._num_askers
        )
        self.watching = Watching(watchers)
        self.metrics = Metrics(
            lambda: self.batcher.num_waiting, lambda: len(self._connections), lambda: self.watching.dropped
        )
        self._connections: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._at_work = Counter[str]()
        self.ending = asyncio.Event()

    def start(self) -> None:
        self.batcher.start()
        self.watching.start()

    def close(self) -> None:
        """Answer what waits, tell watchers what happened, end the threads."""
        if not self.batcher.close(self.config.shutdown_s):
            logger.warning("the policy is still busy; its last answer is lost")
        self.watching.close()

    async def finish(self) -> None:
        """Take no more requests; wait until those that were begun are answered, `shutdown_s` at most."""
        self.ending.set()
        self.batcher.hurry()
        until = time.monotonic() + self.config.shutdown_s
        while (self._at_work.total() or self._connections) and time.monotonic() < until:
            await asyncio.sleep(_TICK_S)
        if left := self._at_work.total():
            logger.warning("%d requests were not answered within --shutdown_s %g", left, self.config.shutdown_s)

    @contextmanager
    def connected(self, address: str) -> Iterator[str]:
        """Counts a client as connected, and gives it a name. Raises Refusal where too many are, or none may come."""
        if self.ending.is_set():
            raise Refusal("shutdown", "the server is shutting down; connect again when it is back")
        if len(self._connections) >= self.config.max_connections:
            raise Refusal(
                "too_many", f"{len(self._connections)} clients are connected, as many as may be (--max_connections)"
            )
        name = f"websocket-{next(self._numbers)}"
        self._connections[name] = address
        logger.info("%s connected from %s", name, address)
        self.watching.tell(ConnectionChanged(name, address, True, time.time()))
        try:
            yield name
        finally:
            del self._connections[name]
            logger.info("%s is gone", name)
            self.watching.tell(ConnectionChanged(name, address, False, time.time()))

    @contextmanager
    def at_work(self, exchange: Exchange) -> Iterator[None]:
        """While a request has come and its answer is not sent, the server does not end."""
        self._at_work[exchange.protocol] += 1
        try:
            yield
        finally:
            self._at_work[exchange.protocol] -= 1

    async def ask(
        self, exchange: Exchange, read: Callable[[], PolicyRequest], size: int
    ) -> tuple[PolicyRequest, PolicyResponse]:
        """Read a request and have it answered.

        Args:
            exchange: whose.
            read: decodes and checks what came; may raise Refusal.
            size: bytes of what came.

        Raises Refusal, and nothing else.
        """
        if self.ending.is_set():
            raise Refusal("shutdown", "the server is shutting down; ask again when it is back")
        try:
            request = await asyncio.to_thread(read) if size > _LARGE else read()
            answer = await asyncio.wrap_future(self.batcher.submit(request))
        except Refusal:
            raise
        except Exception as error:
            logger.exception("%s: the server broke", exchange.request_id)
            raise Refusal("policy", f"the server broke ({type(error).__name__}); its log says more") from error
        total = round(1000 * (time.perf_counter() - exchange.began), 3)
        return request, replace(answer, timing={**answer.timing, "total": total})

    def answered(self, exchange: Exchange, request: PolicyRequest, answer: PolicyResponse, actions: Any) -> None:
        """Note an answer that was sent, with the actions as they were."""
        self.metrics.answered(exchange.protocol, answer)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "%s answered %s, query %d of %s, in %.1f ms (batch of %d)", exchange.request_id, exchange.connection,
                answer.query, answer.session, answer.timing["total"], int(answer.timing["batch"]),
                extra={"request_id": exchange.request_id, "connection": exchange.connection, "timing": answer.timing},
            )  # fmt: skip
        self.watching.tell(
            Answered(
                exchange.request_id,
                exchange.time,
                exchange.connection,
                answer.session,
                answer.query,
                request.observation,
                request.instruction,
                actions,
                answer.kept,
                answer.picks,
                answer.scores,
                request.executed,
                (*answer.warnings, *request.notes),
                answer.timing,
            )  # fmt: skip
        )

    def refused(self, exchange: Exchange, refusal: Refusal) -> None:
        """Note a request that gets no actions."""
        self.metrics.refused(exchange.protocol, refusal.code)
        logger.warning(
            "%s refused %s (%s): %s", exchange.request_id, exchange.connection, refusal.code, refusal.reason,
            extra={"request_id": exchange.request_id, "connection": exchange.connection, "code": refusal.code},
        )  # fmt: skip
        self.watching.tell(
            Refused(exchange.request_id, exchange.time, exchange.connection, refusal.reason, refusal.code)
        )

    def _num_askers(self) -> int:
        """HTTP's clients are there only while they ask."""
        return len(self._connections) + self._at_work["http"]
