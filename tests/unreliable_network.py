"""A network between a client and a policy server that delays, mixes up, swallows and cuts on command."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from types import TracebackType
from urllib.parse import urlsplit

_POLL_S = 0.05
_BINARY = 2


class UnreliableNetwork:
    """Passes TCP connections on to the server at `server_url`; clients call `url`. At first all is well.

    Attributes:
        delay_s: what the server sends arrives so much later.
        is_mixed_up: before each answer the one that the server gave before it arrives once more, to whichever request.
        mixed_up: how often that happened.
    """

    def __init__(self, server_url: str) -> None:
        parts = urlsplit(server_url)
        assert parts.hostname is not None and parts.port is not None
        self._server = parts.hostname, parts.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay_s, self.is_mixed_up, self.mixed_up = 0.0, False, 0
        self._passes, self._is_closed = threading.Event(), False
        self._passes.set()
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._last: bytes | None = None
        self._start(self._accept)

    def __enter__(self) -> UnreliableNetwork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closed = True
        self.mend()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or accept() waits on
        self._listener.close()
        self.reset()
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        """Nothing arrives any more, on either side, and neither side is told; new connections get no answer."""
        self._passes.clear()

    def mend(self) -> None:
        """What was under way when the network was cut arrives, late, as TCP would send it again."""
        self._passes.set()

    def reset(self) -> None:
        """All connections break, and both sides are told so."""
        while self._ends:
            with suppress(OSError):
                self._ends[-1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._ends[-1].shutdown(socket.SHUT_RDWR)
            self._ends.pop().close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._passes.wait()
            try:
                server = socket.create_connection(self._server, timeout=5)
            except OSError:
                client.close()  # nobody listens there
                continue
            server.settimeout(None)
            self._ends += [client, server]
            self._start(self._up, client, server)
            self._start(self._down, server, client)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                self._passes.wait()
                server.sendall(data)
        self._end(client, server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        """Message by message: first the answer to the handshake, then websocket frames, the first of which greets."""
        with suppress(OSError, EOFError):
            self._deliver(_read_head(server), client)
            greeted = False
            while True:
                frame = _read_frame(server)
                if greeted and frame[0] & 15 == _BINARY:
                    if self.is_mixed_up and self._last is not None:
                        self.mixed_up += 1
                        self._deliver(self._last, client)
                    self._last = frame
                greeted = True
                self._deliver(frame, client)
        self._end(server, client)

    def _deliver(self, data: bytes, client: socket.socket) -> None:
        due = time.monotonic() + self.delay_s
        while time.monotonic() < due and not self._is_closed:
            time.sleep(min(_POLL_S, max(due - time.monotonic(), 0.0)))
        self._passes.wait()
        client.sendall(data)

    def _end(self, *ends: socket.socket) -> None:
        self._passes.wait()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _read(end: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if not (part := end.recv(size - len(parts))):
            raise EOFError
        parts += part
    return bytes(parts)


def _read_head(end: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += _read(end, 1)
    return head


def _read_frame(end: socket.socket) -> bytes:
    """A frame of a server, which masks nothing (RFC 6455, section 5.2)."""
    head = _read(end, 2)
    extended = {126: 2, 127: 8}.get(head[1] & 127, 0)
    length = _read(end, extended)
    size = int.from_bytes(length, "big") if extended else head[1] & 127
    return head + length + _read(end, size)
