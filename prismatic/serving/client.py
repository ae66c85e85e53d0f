"""A client of policy servers that speak openpi's websocket protocol, whosever they are.

The server greets with its metadata; every observation is then answered by one message, and an error by a text frame,
the server's traceback (https://github.com/Physical-Intelligence/openpi). A connection carries one question at a time;
several at once take as many connections.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

from prismatic.serving.wire import pack, unpack

logger = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 20.0
"""How long the first connection and its greeting may take; later ones may wait for another one's policy query."""

_EXPECTED = "expected a policy server that speaks the openpi-client websocket protocol"
_REMEDY = "start the server, or correct the address"
_CLOSE_TIMEOUT_S = 1.0


class PolicyServerError(ConnectionError):
    """A policy server that is not there, is not one, broke, or answered what cannot be used."""


@dataclass(frozen=True)
class Reply:
    """One answer: `content` as the server sent it, and the `seconds` from question to answer on this side's clock."""

    content: dict[Any, Any]
    seconds: float


def check_url(url: str) -> None:
    """Raises ValueError for what is not the address of a websocket."""
    expected = "expected ws://host:port or wss://host:port"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is no address ({error}); {expected}") from error
    if parts.scheme not in ("ws", "wss") or not host or any(sign.isspace() for sign in url):
        raise ValueError(f"{url!r} is no address of a websocket; {expected}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"the address of {host} names a user or a password, which results would show; leave them out")


class PolicyClient:
    """Asks a policy server, from as many threads as one likes.

    A connection that broke, timed out or reported an error is thrown away; the next question opens a new one. Several
    connections must be greeted by the same metadata, so that answers of two policies never mix.

    Args:
        url: ws://host:port or wss://host:port.
        timeout_s: how long a reply may take. Some servers compile at their first one.

    Raises:
        ValueError: for another kind of address.
        PolicyServerError: when nothing answers there, or not as a policy server does.
    """

    def __init__(self, url: str, timeout_s: float = 300.0) -> None:
        check_url(url)
        if not timeout_s > 0:
            raise ValueError(f"a timeout of {timeout_s} seconds: expected more than 0")
        self.url, self.timeout_s = url, timeout_s
        self._greeting: str | bytes | None = None
        self._idle: list[tuple[ExitStack, ClientConnection]] = []
        self._finalizer = weakref.finalize(self, _close_all, self._idle)
        self.metadata: dict[Any, Any] = {}
        self._idle.append(self._open(min(GREETING_TIMEOUT_S, timeout_s)))

    def infer(self, observation: Mapping[str, Any]) -> Reply:
        """Ask once.

        Raises:
            PolicyServerError: when the server reports an error (its last line is in the message, all of it in the log),
                does not answer in time, closes the connection, or sends what is not a message.
        """
        question = pack(observation)
        with self._connection() as connection:
            began = time.perf_counter()
            try:
                connection.send(question)
                answer = connection.recv(self.timeout_s)
            except TimeoutError as error:
                raise self._error(f"has not answered within {self.timeout_s:g} s; allow more if it is slow") from error
            except ConnectionClosed as error:
                raise self._error(f"closed the connection instead of answering ({error})") from error
            seconds = time.perf_counter() - began
            return Reply(self._content(answer, "answered"), seconds)

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Ask all at the same time, each on a connection of its own; answers in the questions' order."""
        if len(observations) == 1:
            return [self.infer(observations[0])]
        with ThreadPoolExecutor(max(len(observations), 1)) as threads:
            return list(threads.map(self.infer, observations))

    def close(self) -> None:
        """Close every connection that nobody uses; may be called twice, and is at the end of the process."""
        _close_all(self._idle)

    @contextmanager
    def _connection(self) -> Iterator[ClientConnection]:
        """An idle connection or a new one. Whatever is raised meanwhile, a late answer included, ends with it."""
        stack, connection = self._take() or self._open(self.timeout_s)
        try:
            yield connection
        except BaseException:
            stack.close()
            raise
        self._idle.append((stack, connection))

    def _take(self) -> tuple[ExitStack, ClientConnection] | None:
        while True:
            try:
                stack, connection = self._idle.pop()
            except IndexError:
                return None
            if connection.state is State.OPEN:
                return stack, connection
            stack.close()

    def _open(self, timeout_s: float) -> tuple[ExitStack, ClientConnection]:
        with ExitStack() as stack:
            try:
                # No keep-alive pings: openpi's server does not answer them while it computes.
                connection = stack.enter_context(
                    connect(
                        self.url,
                        compression=None,
                        max_size=None,
                        open_timeout=timeout_s,
                        ping_interval=None,
                        close_timeout=_CLOSE_TIMEOUT_S,
                    )
                )
                greeting = connection.recv(timeout_s)
            except TimeoutError as error:
                raise self._absent(f"no answer within {timeout_s:g} s") from error
            except InvalidStatus as error:
                raise self._absent(f"it is an HTTP server, which answers {error.response.status_code}") from error
            except (WebSocketException, EOFError) as error:
                raise self._absent(f"{type(error).__name__}: {error}") from error
            except OSError as error:
                raise self._absent(error.strerror or str(error)) from error
            metadata = self._content(greeting, "greeted")
            if self._greeting is None:
                self._greeting, self.metadata = greeting, metadata
            elif greeting != self._greeting:
                raise self._error(
                    f"greets with other metadata than before ({metadata} instead of {self.metadata}); is it another "
                    "server now? One evaluation needs one"
                )
            return stack.pop_all(), connection

    def _content(self, message: str | bytes, did: str) -> dict[Any, Any]:
        if isinstance(message, str):
            lines = [line for line in message.splitlines() if line.strip()]
            if len(lines) > 1:
                logger.warning("the policy server at %s sent:\n%s", self.url, message)
            raise self._error(f"{did} with an error: {lines[-1].strip() if lines else 'an empty text'}")
        try:
            content = unpack(message)
        except ValueError as error:
            raise self._error(f"{did} with {error}; {_EXPECTED}") from error
        if not isinstance(content, dict):
            raise self._error(f"{did} with a {type(content).__name__} instead of a dict; {_EXPECTED}")
        return content

    def _absent(self, reason: str) -> PolicyServerError:
        return PolicyServerError(f"no policy server at {self.url} ({reason}); {_EXPECTED}: {_REMEDY}")

    def _error(self, what: str) -> PolicyServerError:
        return PolicyServerError(f"the policy server at {self.url} {what}")


def _close_all(idle: list[tuple[ExitStack, ClientConnection]]) -> None:
    while idle:
        idle.pop()[0].close()
