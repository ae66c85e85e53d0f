"""Runs the application: a socket that is taken early, a server in this thread or one of its own, a graceful end."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from prismatic.serving.server.service import Service
from prismatic.serving.settings import ServerConfig

logger = logging.getLogger(__name__)

_PING_S, _PONG_S = 20.0, 60.0
_MOST_HEADER_BYTES = 32 * 1024
_START_S = 30.0


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
        self._server = _Server(_uvicorn_config(application, config), application.state.service)
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
        """End what `start` began: questions that were begun are answered first."""
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

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self.signal: int | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._service.finish()
        await super().shutdown(sockets)

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


def _uvicorn_config(application: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        loop="asyncio",
        http="h11",
        ws="websockets-sansio",
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
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        timeout_graceful_shutdown=5,
    )
