"""Runs the application: a socket that is taken early, a server in this thread or one of its own, a graceful end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from prismatic.serving.server.access import MOST_HEADER_BYTES
from prismatic.serving.server.service import Service
from prismatic.serving.server.websocket import WebSockets
from prismatic.serving.settings import ServerConfig

logger = logging.getLogger(__name__)

_PING_S, _PONG_S = 20.0, 60.0
_SPARE_CONNECTIONS = 64
"""Connections beside those that ask: HTTP's, pages'."""
_REQUEST_S = 20.0
"""How long a connection may take to bring a whole request line and headers."""
_START_S, _LET_GO_S = 30.0, 0.3


def take_address(config: ServerConfig) -> socket.socket:
    """A socket bound to the address, which nobody can connect to before the server listens.

    Raises OSError in a sentence: the address is taken, or is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"--host {config.host} --port {config.port} cannot be used ({reason}); stop what listens there, or give "
            "another one (--port 0 takes any free one)"
        ) from error


class PolicyServer:
    """An application that listens.

    Args:
        application: from `build_application`.
        config: its address, TLS and limits.
        bound: from `take_address`; None: taken now, which raises OSError as that does.
    """

    def __init__(self, application: FastAPI, config: ServerConfig, bound: socket.socket | None = None) -> None:
        self._bound = bound or take_address(config)
        self._config = config
        host, self.port = self._bound.getsockname()[:2]
        self._host = f"[{host}]" if ":" in host else host
        address = f"{self.url} for WebSockets, {self.http_url}/act for POST"
        if config.page:
            address += f", {self.http_url} in a browser to watch"
        self._server = _Server(_uvicorn_config(application, config), application.state.service, address)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Of the WebSocket."""
        return f"{'ws' if self._config.ssl_certfile is None else 'wss'}://{self._host}:{self.port}"

    @property
    def http_url(self) -> str:
        return f"{'http' if self._config.ssl_certfile is None else 'https'}://{self._host}:{self.port}"

    def start(self) -> None:
        """Serve in a thread; returns when it listens."""
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        until = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the server did not start; the log says why")
            time.sleep(0.005)

    def stop(self) -> None:
        """End what `start` began: requests that were begun are answered first."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def serve_forever(self) -> int | None:
        """Serve in this thread, the main one, until a signal ends it; which one that was."""
        self._run()
        return self._server.signal

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._bound])
        finally:
            self._bound.close()


class _Server(uvicorn.Server):
    """uvicorn's, which answers what was begun before it ends, and ends without raising the signal again."""

    def __init__(self, config: uvicorn.Config, service: Service, address: str) -> None:
        super().__init__(config)
        self._service, self._address = service, address
        self.signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        logger.info("serving: %s", self._address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._service.finish()
        # uvicorn says goodbye to every connection, and fails over one that a client is closing just now.
        await self._let_go(lambda connection: connection.transport.is_closing())
        await super().shutdown(sockets)
        await self._let_go(lambda connection: True)

    async def _let_go(self, unwanted: Callable[[Any], bool]) -> None:
        connections = [one for one in self.server_state.connections if unwanted(one)]
        for connection in connections:
            connection.transport.abort()
        until = time.monotonic() + _LET_GO_S
        while time.monotonic() < until and not self.server_state.connections.isdisjoint(connections):
            await asyncio.sleep(0.002)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signal is None:
            logger.info("%s: answering what was begun, then ending", signal.Signals(sig).name)
        self.signal = self.signal or sig
        super().handle_exit(sig, frame)


def _http_protocol(most_connections: int) -> type[H11Protocol]:
    """uvicorn's, which lets go of connections that are too many, or that open and bring no request."""

    class Http(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most_connections:
                logger.warning("%d connections are open, as many as may be; one more is closed", most_connections)
                transport.abort()
            else:
                self._wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._stop_waiting()
            self._patience = self.loop.call_later(_REQUEST_S, self._let_go)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()

        def _let_go(self) -> None:
            is_answering = self.cycle is not None and not self.cycle.response_complete
            if not is_answering and self.transport.get_protocol() is self:
                self.transport.close()

    return Http


def _uvicorn_config(application: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        loop="asyncio",
        http=_http_protocol(config.max_connections + _SPARE_CONNECTIONS),
        ws=WebSockets,
        ws_max_size=int(config.max_message_mb * 2**20),
        ws_ping_interval=_PING_S,
        ws_ping_timeout=_PONG_S,
        ws_per_message_deflate=False,  # a compressed message says nothing about its size
        lifespan="on",
        log_config=None,
        log_level="warning",  # at `info` it writes down addresses with what stands behind the question mark
        access_log=False,
        proxy_headers=False,  # nobody may say who he is
        server_header=False,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        timeout_graceful_shutdown=1,  # what was begun is answered by then; over TLS, goodbyes may be waited for
    )
