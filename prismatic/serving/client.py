"""A client of policy servers that speak openpi's websocket protocol, whosever they are.

The server greets with its metadata; every observation is then answered by one message, and an error by a text frame,
which of openpi's own server is a traceback (https://github.com/Physical-Intelligence/openpi). A connection carries one
request at a time; several at once take as many connections.
"""

from __future__ import annotations

import itertools
import logging
import socket
import ssl
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

from prismatic.serving.address import API_KEY_VARIABLE, check_url, key_headers, tls_context
from prismatic.serving.wire import pack, unpack
from prismatic.vla.robots import RobotSpec, get_robot, misfits

logger = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 20.0
"""How long the first connection and its greeting may take; later ones may wait for another one's policy query."""

_EXPECTED = "expected a policy server that speaks the openpi-client websocket protocol"
_REMEDY = "start the server, or correct the address"
_CLOSE_TIMEOUT_S = 1.0
_MEASURED = ("engine", "policy.engine", "policy.dtype_reason")
_RETRY_S, _TELL_S = 0.25, 5.0


class PolicyServerError(ConnectionError):
    """A policy server that is not there, is not one, broke, or answered what cannot be used."""


class PolicyServerAbsent(PolicyServerError):
    """Nothing that could be a policy server answers there; it may be one that is still starting."""


@dataclass(frozen=True)
class Reply:
    """One answer: `content` as the server sent it, and the `seconds` from request to answer on this side's clock."""

    content: dict[Any, Any]
    seconds: float


class PolicyClient:
    """Asks a policy server, from as many threads as one likes.

    A connection that broke, timed out or reported an error is thrown away; the next request opens a new one. Several
    connections must be greeted by the same metadata, so that answers of two policies never mix; only what a server of
    this project measures as it starts may differ. Where the server echoes ids, each answer's is compared with its
    request's.

    Args:
        url: ws://host:port or wss://host:port.
        timeout_s: how long a request may take, its connection included. Some servers compile at their first one.
        wait_s: how long to wait for a server that is still starting.
        api_key: sent as `Authorization: Api-Key ...`; None: what the environment variable LIGHTVLA_API_KEY says, if it
            is set.
        tls: for wss: a file of certificates to trust (the server's own, if it signed it itself), or a context; None:
            the authorities that the system trusts.
        robot: the robot that is driven, or its name: servers of another one are refused.

    Raises:
        ValueError: for another kind of address, an unusable key, or `tls` for an address without it.
        PolicyServerError: when nothing answers there, or not as a policy server does, or it serves another robot.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 300.0,
        *,
        wait_s: float = 0.0,
        api_key: str | None = None,
        tls: str | Path | ssl.SSLContext | None = None,
        robot: RobotSpec | str | None = None,
    ) -> None:
        check_url(url)
        if not timeout_s > 0:
            raise ValueError(f"a timeout of {timeout_s} seconds: expected more than 0")
        self.url, self.timeout_s = url, timeout_s
        self._headers = key_headers(url, api_key)
        self._tls = tls_context(url, tls)
        self._facts: dict[str, bytes] | None = None
        self._idle: list[tuple[ExitStack, ClientConnection]] = []
        self._finalizer = weakref.finalize(self, _close_all, self._idle)
        self._ids = itertools.count()
        self.metadata: dict[Any, Any] = {}
        self._idle.append(self._open_when_there(min(GREETING_TIMEOUT_S, timeout_s), wait_s))
        self._served: RobotSpec | None = None
        if robot is not None:
            try:
                self._check_robot(get_robot(robot) if isinstance(robot, str) else robot)
            except BaseException:
                self.close()
                raise
        self.begin_episode()

    @property
    def robot(self) -> RobotSpec:
        """The robot that the server's policy drives.

        Raises:
            PolicyServerError: when its metadata does not say.
        """
        if self._served is None:
            described = self.metadata.get("robot")
            if not isinstance(described, dict):
                raise self._error(f"does not describe its robot, but says {described!r}; expected its RobotSpec")
            try:
                self._served = RobotSpec.from_json(described)
            except (ValueError, TypeError) as error:
                raise self._error(f"describes a robot that is none: {error}") from error
        return self._served

    def begin_episode(self) -> None:
        """Another episode: a policy with a memory begins it anew with the next `act`."""
        self._session, self._queries = uuid.uuid4().hex, itertools.count()

    def act(self, observation: Mapping[str, Any], instruction: str, *, seed: int | None = None) -> NDArray[np.float64]:
        """One observation -> (chunk, action_dim) actions in the robot's units, all finite.

        Args:
            observation: the robot's camera keys, uint8 (H, W, 3), and its state, (P,), as for `Policy.act`.
            instruction: the sentence.
            seed: of what is random about the actions.

        Raises:
            PolicyServerError: as `infer`, for actions that are not as many finite numbers as the robot takes, and for a
                server of another convention than `lightvla`.
        """
        if (convention := self.metadata.get("convention")) != "lightvla":
            raise self._error(
                f"speaks the convention {convention!r}; expected 'lightvla'; ask others by infer(), with their own keys"
            )
        request = {**observation, "prompt": instruction, "session": self._session, "query": next(self._queries)}
        if seed is not None:
            request["seed"] = seed
        return self._checked_actions(self.infer(request).content)

    def infer(self, observation: Mapping[str, Any]) -> Reply:
        """Ask once.

        Raises:
            PolicyServerError: when the server reports an error (its last line is in the message, all of it in the log),
                does not answer in time, closes the connection, answers another request, or sends what is no message.
        """
        deadline = time.monotonic() + self.timeout_s
        with self._connection() as connection:
            echoes = self.metadata.get("echoes_id") is True
            asked = {"id": next(self._ids), **observation} if echoes else observation
            request = pack(asked)
            began = time.perf_counter()
            try:
                with _broken_at(deadline, connection):
                    connection.send(request)
                answer = connection.recv(max(deadline - time.monotonic(), 0.0))
            except TimeoutError as error:
                raise self._late() from error
            except ConnectionClosed as error:
                if time.monotonic() >= deadline:  # while the request was still on its way out
                    raise self._late() from error
                raise self._error(f"closed the connection instead of answering ({error})") from error
            seconds = time.perf_counter() - began
            content = self._content(answer, "answered")
            if echoes and content.get("id") != asked["id"]:
                raise self._error(
                    f"answered request {content.get('id')!r} when asked {asked['id']!r}; that answer is not used, and "
                    "its connection is thrown away"
                )
            return Reply(content, seconds)

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Ask all at the same time, each on a connection of its own; answers in the requests' order."""
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
            if (trouble := _trouble(connection)) is None:
                return stack, connection
            logger.warning("the policy server at %s %s; opening another connection", self.url, trouble)
            stack.close()

    def _open_when_there(self, timeout_s: float, wait_s: float) -> tuple[ExitStack, ClientConnection]:
        """The first connection, trying again for so long."""
        began = time.monotonic()
        told = -_TELL_S
        while True:
            try:
                return self._open(timeout_s)
            except PolicyServerAbsent as error:
                waited = time.monotonic() - began
                if waited + _RETRY_S > wait_s:
                    raise
                if waited - told >= _TELL_S:
                    logger.info("waiting for a policy server, %.0f of %g s: %s", waited, wait_s, error)
                    told = waited
                time.sleep(_RETRY_S)

    def _open(self, timeout_s: float) -> tuple[ExitStack, ClientConnection]:
        deadline = time.monotonic() + timeout_s
        with ExitStack() as stack:
            try:
                # No keep-alive pings: openpi's server does not answer them while it computes.
                connection = stack.enter_context(
                    connect(
                        self.url,
                        compression=None,
                        max_size=None,
                        open_timeout=timeout_s,
                        additional_headers=self._headers,
                        ssl=self._tls,
                        ping_interval=None,
                        close_timeout=_CLOSE_TIMEOUT_S,
                    )
                )
                greeting = connection.recv(max(deadline - time.monotonic(), 0.0))
            except TimeoutError as error:
                raise self._absent(f"no answer within {timeout_s:g} s") from error
            except ssl.SSLCertVerificationError as error:
                raise self._error(
                    f"has a certificate that is not trusted here ({error.verify_message}); give its file, or that of "
                    "who signed it, as tls"
                ) from error
            except InvalidStatus as error:
                if error.response.status_code in (401, 403):
                    given = "the key that was given" if self._headers else "a client without a key"
                    raise self._error(
                        f"refuses {given} ({error.response.status_code}); give its key as api_key, or in "
                        f"{API_KEY_VARIABLE}"
                    ) from error
                raise self._absent(f"it is an HTTP server, which answers {error.response.status_code}") from error
            except (WebSocketException, EOFError) as error:
                raise self._absent(f"{type(error).__name__}: {error}") from error
            except OSError as error:
                raise self._absent(error.strerror or str(error)) from error
            metadata = self._content(greeting, "greeted")
            facts = _facts(metadata)
            if self._facts is None:
                self._facts, self.metadata = facts, metadata
            elif facts != self._facts:
                raise self._error(
                    f"greets with other metadata than before ({_difference(self._facts, facts)}); is it another server "
                    "now? Start the old one again, or begin anew with this one"
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

    def _checked_actions(self, content: Mapping[Any, Any]) -> NDArray[np.float64]:
        robot = self.robot
        expected = (
            f"expected numbers ({robot.chunk_length}, {robot.action_dim}), as its robot {robot.name!r} takes them"
        )
        try:
            actions = np.asarray(content.get("actions"))
        except ValueError as error:
            raise self._error(f"returned actions of different lengths; {expected}") from error
        if actions.dtype.kind not in "fiu" or actions.shape != (robot.chunk_length, robot.action_dim):
            raise self._error(f"returned actions as {actions.dtype} {actions.shape}; {expected}")
        if not np.isfinite(actions).all():
            raise self._error(
                f"returned actions with NaN or infinity, first at {np.argwhere(~np.isfinite(actions))[0]}"
            )
        return actions.astype(np.float64)

    def _check_robot(self, driven: RobotSpec) -> None:
        served = self.robot
        if served.name != driven.name or (differ := misfits(driven, served)):
            facts = "" if served.name != driven.name else f", which differs in {', '.join(differ)}"
            raise self._error(
                f"serves a policy for robot {served.name!r}{facts}; this client drives {driven.name!r}. Start the "
                "server with a checkpoint of that robot"
            )

    def _late(self) -> PolicyServerError:
        return self._error(f"has not answered within {self.timeout_s:g} s; allow more if it is slow")

    def _absent(self, reason: str) -> PolicyServerError:
        return PolicyServerAbsent(f"no policy server at {self.url} ({reason}); {_EXPECTED}: {_REMEDY}")

    def _error(self, what: str) -> PolicyServerError:
        return PolicyServerError(f"the policy server at {self.url} {what}")


def _facts(metadata: Mapping[Any, Any], below: str = "") -> dict[str, bytes]:
    """What metadata says, one message per fact, without what is measured as a server starts."""
    found: dict[str, bytes] = {}
    for key, value in metadata.items():
        name = f"{below}{key}"
        if name in _MEASURED:
            continue
        found |= _facts(value, f"{name}.") if isinstance(value, dict) else {name: pack(value)}
    return found


def _difference(before: Mapping[str, bytes], now: Mapping[str, bytes]) -> str:
    """The first fact in which two servers differ."""
    name = min(name for name in {*before, *now} if before.get(name) != now.get(name))
    old, new = (repr(unpack(facts[name])) if name in facts else "nothing" for facts in (before, now))
    return f"{name}: {new} instead of {old}"


def _trouble(connection: ClientConnection) -> str | None:
    """What is wrong with a connection on which nothing is being asked; None: nothing."""
    if connection.state is not State.OPEN:
        return f"closed an idle connection ({connection.close_code or 'without a word'})"
    try:
        unasked = connection.recv(0)
    except TimeoutError:
        return None
    except ConnectionClosed as error:
        return f"closed an idle connection ({error})"
    return f"sent {unasked!r} without being asked" if isinstance(unasked, str) else "sent an answer without a request"


@contextmanager
def _broken_at(deadline: float, connection: ClientConnection) -> Iterator[None]:
    """Breaks a connection at that time: sending blocks for minutes where a network swallows everything."""

    def break_it() -> None:
        with suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(deadline - time.monotonic(), 0.0), break_it)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _close_all(idle: list[tuple[ExitStack, ClientConnection]]) -> None:
    while idle:
        idle.pop()[0].close()
