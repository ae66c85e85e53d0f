"""The WebSocket endpoint, in openpi's protocol: a greeting, then one message back for each that comes."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from prismatic.serving.server.access import client_address, deny
from prismatic.serving.server.payloads import PolicyRequest, Refusal, reply_of
from prismatic.serving.server.service import Exchange, Pace, Service
from prismatic.serving.wire import pack, unpack

BROKE, GOING_AWAY, TOO_BIG = 1011, 1001, 1009
_UNREADABLE = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 54\r\n"
    b"Connection: close\r\n\r\nthe handshake cannot be read: it has a body, or breaks"
)


async def converse(websocket: WebSocket, service: Service) -> None:
    """One client from its handshake to its end.

    What it asks wrongly is answered by a text, one sentence, and the end of the connection: openpi's client raises on a
    text, and whoever misunderstood once is not believed the second time.
    """
    try:
        with service.connected(client_address(websocket)) as name:
            await websocket.accept()
            await websocket.send_bytes(pack(service.served.info()))
            conversation = _Conversation(websocket, service, name)
            while await conversation.answer_next():
                pass
    except Refusal as refusal:
        service.refused(Exchange("websocket", client_address(websocket)), refusal)
        await deny(websocket, refusal)
    except WebSocketDisconnect:
        pass


class _Conversation:
    """One greeted client."""

    def __init__(self, websocket: WebSocket, service: Service, name: str) -> None:
        self._websocket, self._service, self._name = websocket, service, name
        self._pace = Pace(service.config.max_rate)

    async def answer_next(self) -> bool:
        """Wait for a request and answer it; whether there may be another."""
        message = await self._receive()
        if message is None:
            return False
        exchange = Exchange("websocket", self._name)
        with self._service.at_work(exchange):
            try:
                await self._answer(exchange, message)
            except Refusal as refusal:
                self._service.refused(exchange, refusal)
                await self._websocket.send_text(f"{refusal.reason} (request {exchange.request_id})")
                await self._websocket.close(GOING_AWAY if refusal.code == "shutdown" else BROKE)
                return False
        return True

    async def _answer(self, exchange: Exchange, message: dict[str, Any]) -> None:
        data = message.get("bytes")
        if data is None:
            raise Refusal("bad_request", "a text came; expected a request packed by msgpack with NumPy arrays")
        self._pace.take()
        request, answer = await self._service.ask(exchange, lambda: self._read(data), len(data))
        reply = reply_of(answer, request, exchange.request_id, self._service.config.convention == "openpi")
        await self._websocket.send_bytes(pack(reply))
        self._service.answered(exchange, request, answer, answer.actions)

    def _read(self, data: bytes) -> PolicyRequest:
        try:
            message = unpack(data)
        except ValueError as error:
            raise Refusal("bad_request", str(error)) from error
        reader = self._service.served.reader
        return reader.read(message, reader.websocket, self._name)

    async def _receive(self) -> dict[str, Any] | None:
        """The next message; None where there is none: the client is gone or idle, or the server ends."""
        receiving = asyncio.ensure_future(self._websocket.receive())
        ending = asyncio.ensure_future(self._service.ending.wait())
        try:
            await asyncio.wait(
                (receiving, ending), timeout=self._service.config.idle_s, return_when=asyncio.FIRST_COMPLETED
            )
            if receiving.done():
                message = dict(receiving.result())
                if message["type"] != "websocket.disconnect":
                    return message
                if message.get("code") == TOO_BIG:
                    most = self._service.config.max_message_mb
                    refusal = Refusal("too_large", f"a message of more than {most:g} MB (--max_message_mb)")
                    self._service.refused(Exchange("websocket", self._name), refusal)
                return None
            await self._websocket.close(GOING_AWAY, "shutting down" if ending.done() else "idle")
            return None
        finally:
            receiving.cancel()
            ending.cancel()


class WebSockets(WebSocketsSansIOProtocol):
    """uvicorn's protocol on `websockets` without input and output, but for two things that it leaves undone.

    It says nothing to a handshake that `websockets` refuses to read (a body, 128 headers, 8192 bytes of one), and keeps
    the connection for ever. And it logs a traceback for a text that is no UTF-8.
    """

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.write(b"".join(self.conn.data_to_send()) or _UNREADABLE)
            self.transport.close()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            self.frames = [b"".join(self.frames).decode(errors="replace").encode()]
        super().send_receive_event_to_app()
