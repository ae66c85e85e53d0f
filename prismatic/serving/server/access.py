"""Who may ask: the key, foreign web pages, and how much a request may bring."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from prismatic.serving.server.payloads import Refusal
from prismatic.serving.settings import Secrets, ServerConfig

STATUSES = {"bad_request": 400, "unauthorized": 401, "too_large": 413, "too_many": 429, "policy": 500, "shutdown": 503}
"""HTTP's status for each code of a refusal."""
OPEN_PATHS = ("/healthz",)
MOST_HEADER_BYTES = 32 * 1024
_PARAMETER = "key"
_BODY_S = 60.0
"""How long a request's body may take to come."""
Noting = Callable[[str, str, Refusal], None]

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Unauthorized(Refusal):
    """A refusal before anything was read. Its status is 401 where a key would help, else 403 (or 431)."""

    def __init__(self, reason: str, status: int, code: str = "unauthorized") -> None:
        super().__init__(code, reason)
        self.status = status


class Gate:
    """Stands before every route: an ASGI application around another one.

    Where there is a key, every request but those to `OPEN_PATHS` must bring it as `Authorization: Api-Key KEY`. A
    browser, which cannot, opens a page once with `?key=KEY`; it gets a cookie instead, which scripts cannot read and
    other sites' pages cannot use, and the address without the key. Without a key the server is this machine's alone,
    and asks that it be called by a name of this machine (else a page whose name points here could ask). Pages of other
    origins are refused in either case.

    Args:
        application: what stands behind the gate.
        config, secrets: limits, names and key.
        refused: told of every refusal here: protocol, address, refusal.
    """

    def __init__(self, application: ASGIApp, config: ServerConfig, secrets: Secrets, refused: Noting) -> None:
        self._application, self._secrets, self._refused = application, secrets, refused
        self._most_mb = config.max_message_mb
        self._uses_tls = config.ssl_certfile is not None
        self._elsewhere = {name.strip().lower() for name in config.allowed_hosts.split(",") if name.strip()}
        self._hosts = {"localhost", "127.0.0.1", "::1", config.host.lower(), *self._elsewhere}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        try:
            response = self._check(connection)
        except Unauthorized as refusal:
            self._refused(scope["type"], client_address(connection), refusal)
            await _refuse(refusal, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._application(scope, receive, send)
        elif response is not None:
            await response(scope, receive, _with_headers(send))
        else:
            await self._pass_on(scope, receive, _with_headers(send))

    def _check(self, connection: HTTPConnection) -> Response | None:
        """What is answered instead of the route; None: the route answers. Raises Unauthorized."""
        if sum(len(name) + len(value) for name, value in connection.scope["headers"]) > MOST_HEADER_BYTES:
            raise Unauthorized(f"headers of more than {MOST_HEADER_BYTES} bytes", 431, "too_large")
        if connection.scope["path"] in OPEN_PATHS:
            return None
        self._check_origin(connection.headers)
        if self._secrets.api_key is None:
            host = _host_name(connection.headers.get("host", ""))
            if host and host not in self._hosts:
                names = ", ".join(sorted(self._hosts))
                raise Unauthorized(
                    f"{host[:60]!r} is no name of this server; expected {names}, or one of --allowed_hosts", 403
                )
            return None
        return self._check_key(connection, self._secrets.api_key)

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        theirs, ours = _netloc(origin), headers.get("host", "").lower()
        if not theirs or (theirs != ours and _host_name(theirs) not in self._elsewhere):
            raise Unauthorized(f"a page of {origin[:60]!r} may not ask this server; open its own page", 403)

    def _check_key(self, connection: HTTPConnection, key: str) -> Response | None:
        given = connection.headers.get("authorization", "")
        if given:
            scheme, _, value = given.partition(" ")
            if scheme.lower() == "api-key" and _same(value.strip(), key):
                return None
            raise Unauthorized("the key is not the server's; send it as `Authorization: Api-Key KEY`", 401)
        if _same(connection.cookies.get(_cookie_name(connection), ""), self._cookie_value(key)):
            return None
        query = parse_qsl(connection.scope.get("query_string", b"").decode("latin-1"))
        offered = [value for name, value in query if name == _PARAMETER]
        if connection.scope["type"] == "http" and connection.scope["method"] == "GET" and offered:
            if not _same(offered[0], key):
                raise Unauthorized("the key in the address is not the server's", 401)
            rest = urlencode([(name, value) for name, value in query if name != _PARAMETER])
            path = connection.scope["path"].lstrip("/\\")
            response = RedirectResponse(f"/{path}{'?' if rest else ''}{rest}", status_code=303)
            response.set_cookie(
                _cookie_name(connection),
                self._cookie_value(key),
                httponly=True,
                samesite="strict",
                secure=self._uses_tls,
                path="/",
            )
            return response
        raise Unauthorized(
            "a key is needed: send `Authorization: Api-Key KEY`, or open a page once with ?key=KEY behind its address",
            401,
        )

    def _cookie_value(self, key: str) -> str:
        """Stands for the key in a browser, which need not hold the key itself."""
        return hmac.new(key.encode(), b"a browser that has shown the key", hashlib.sha256).hexdigest()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the route answer, with a body of so many bytes at most, which comes in time."""
        body = _Body(receive, self._most_mb)
        answer = _Answering(send)
        try:
            body.check_length(Headers(scope=scope))
            await self._application(scope, body.receive, answer.send)
        except Refusal as refusal:
            if answer.began:
                raise
            await refusal_response(refusal)(scope, receive, send)


class _Body:
    """A request's body, counted and timed."""

    def __init__(self, receive: Receive, most_mb: float) -> None:
        self._receive, self._most_mb, self._most = receive, most_mb, int(most_mb * 2**20)
        self._bytes, self._is_whole = 0, False
        self._until = time.monotonic() + _BODY_S

    def check_length(self, headers: Headers) -> None:
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._most:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()  # until the client has gone
        try:
            message = await asyncio.wait_for(self._receive(), max(self._until - time.monotonic(), 0.0))
        except asyncio.TimeoutError:
            raise Refusal("bad_request", f"the request's body took more than {_BODY_S:g} s") from None
        self._bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._bytes > self._most:
            raise self._too_large()
        return message

    def _too_large(self) -> Refusal:
        return Refusal("too_large", f"a body of more than {self._most_mb:g} MB (--max_message_mb)")


class _Answering:
    """Notes whether an answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.began = False

    async def send(self, message: Message) -> None:
        self.began = True
        await self._send(message)


def refusal_response(refusal: Refusal, request_id: str = "") -> Response:
    """`{"error": ..., "request_id": ...}` with the refusal's status."""
    status = getattr(refusal, "status", STATUSES[refusal.code])
    headers = {"WWW-Authenticate": "Api-Key"} if status == 401 else {"Retry-After": "1"} if status in (429, 503) else {}
    content = {"error": refusal.reason, **({"request_id": request_id} if request_id else {})}
    return JSONResponse(content, status, headers={**headers, **({"X-Request-ID": request_id} if request_id else {})})


async def deny(websocket: WebSocket, refusal: Refusal) -> None:
    """Refuse a handshake by HTTP's status and the sentence."""
    await websocket.send_denial_response(refusal_response(refusal))


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await refusal_response(refusal)(scope, receive, _with_headers(send))
    else:
        websocket = WebSocket(scope, receive, send)
        await receive()  # the handshake
        await deny(websocket, refusal)


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", [])}
            ours = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *(pair for pair in ours if pair[0] not in given)]
        await send(message)

    return send_with_headers


def _cookie_name(connection: HTTPConnection) -> str:
    """Browsers keep a host's cookies together whatever the port, and each server on it has a key of its own."""
    return f"lightvla_key_{(connection.scope.get('server') or ('', 0))[1]}"


def _same(one: str, other: str) -> bool:
    """In a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode(errors="replace"), other.encode())


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(netloc: str) -> str:
    """Without the port, which a proxy or a tunnel may have changed."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return netloc.lower()


def client_address(connection: HTTPConnection) -> str:
    """Where a client calls from: its host and port."""
    return "unknown" if connection.client is None else f"{connection.client.host}:{connection.client.port}"


def json_error(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    """The same form for what the framework refuses: no such path, another method."""
    return JSONResponse({"error": reason}, status, headers=headers)
