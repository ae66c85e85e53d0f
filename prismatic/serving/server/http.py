"""The HTTP routes: POST /act in OpenVLA-OFT's payload, and what says how the server is."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from prismatic.serving import json_arrays
from prismatic.serving.server.access import refusal_response
from prismatic.serving.server.payloads import LONGEST_NAME, PolicyRequest, Refusal
from prismatic.serving.server.service import Exchange, Pace, Service

logger = logging.getLogger(__name__)

_CLIENTS_KEPT = 1024
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ARRAY = {
    "type": "object",
    "required": ["__numpy__", "dtype", "shape"],
    "properties": {
        "__numpy__": {"type": "string", "format": "byte"},
        "dtype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 8},
    },
    "description": "A NumPy array as json_numpy writes it.",
}
_ABOUT_SCHEMA = {
    "seed": {"type": ["integer", "null"], "minimum": 0},
    "session": {"type": ["string", "null"], "maxLength": LONGEST_NAME},
    "query": {"type": ["integer", "null"], "minimum": 0},
    "id": {"type": ["integer", "string", "null"], "maxLength": LONGEST_NAME},
}
_REFUSALS = {
    400: "The body is no request, or not this policy's: the sentence names the field.",
    401: "A key is needed.",
    403: "A page of another origin, or a name that is none of this server's.",
    413: "The body, a picture or the sentence is too large.",
    429: "Asked too often, or too many wait.",
    431: "The headers are too large.",
    500: "The policy computed no usable actions.",
    503: "The server is shutting down.",
}


class Error(BaseModel):
    """Why there are no actions."""

    error: str
    request_id: str | None = None


def build_router(service: Service) -> APIRouter:
    """The routes of a service."""
    router = APIRouter()
    paces = _Paces(service.config.max_rate)

    @router.get("/healthz", response_class=PlainTextResponse, responses={503: {"description": "shutting down"}})
    async def healthz() -> PlainTextResponse:
        """OK while requests are taken."""
        ending = service.ending.is_set()
        return PlainTextResponse("shutting down\n" if ending else "OK\n", 503 if ending else 200)

    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": _REFUSALS[status]} for status in (401, 403, 431)
    }

    @router.get("/info", responses=refusals, response_model=dict[str, Any])
    async def info() -> JSONResponse:
        """What this server is: policy, robot, cameras, bounds of actions, limits, versions."""
        return JSONResponse(service.served.info())

    @router.get("/metrics", response_class=PlainTextResponse, responses=refusals)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=_METRICS_TYPE)

    @router.post("/act", **_description_of_act(service))
    async def act(request: Request) -> Response:
        """An observation and its instruction; the answer is the action chunk, a list of arrays of one action each."""
        host = "unknown" if request.client is None else request.client.host
        exchange = Exchange("http", f"http {host}")
        with service.at_work(exchange):
            try:
                return await _act(service, paces, exchange, await request.body())
            except Refusal as refusal:
                service.refused(exchange, refusal)
                return refusal_response(refusal, exchange.request_id)
            except ClientDisconnect:
                return Response(status_code=400)  # to nobody

    return router


async def _act(service: Service, paces: _Paces, exchange: Exchange, body: bytes) -> Response:
    paces.of(exchange.connection).take()
    encoded = False

    def read() -> PolicyRequest:
        nonlocal encoded
        message, encoded = _decode(body)
        reader = service.served.reader
        return reader.read(message, reader.http, exchange.connection, remembers=False)

    request, answer = await service.ask(exchange, read, len(body))
    text = json_arrays.dumps(list(answer.actions))
    headers = {"X-Request-ID": exchange.request_id}
    content = json_arrays.dumps(text) if encoded else text
    service.answered(exchange, request, answer, answer.actions)
    return Response(content, media_type="application/json", headers=headers)


def _decode(body: bytes) -> tuple[Any, bool]:
    """The request; whether it came as `{"encoded": "<JSON>"}`, OpenVLA-OFT's form for clients without json_numpy."""
    try:
        message = json_arrays.loads(body)
        if isinstance(message, dict) and "encoded" in message:
            if not isinstance(inner := message["encoded"], str) or len(message) > 1:
                raise ValueError('"encoded" stands alone and holds JSON as text')
            return json_arrays.loads(inner), True
        return message, False
    except ValueError as error:
        raise Refusal("bad_request", f"the body is no request: {error}") from error


class _Paces:
    """Those of HTTP's clients by their address, the latest ones."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._known: OrderedDict[str, Pace] = OrderedDict()

    def of(self, client: str) -> Pace:
        pace = self._known.pop(client, None) or Pace(self._rate)
        self._known[client] = pace
        if len(self._known) > _CLIENTS_KEPT:
            self._known.popitem(last=False)
        return pace


def _description_of_act(service: Service) -> dict[str, Any]:
    """What OpenAPI says about POST /act beside its docstring; what a schema cannot say is refused with 400."""
    names, robot, config = service.served.reader.http, service.served.policy.robot, service.config
    numbers = {"type": "array", "items": {"type": "number"}}
    state = {**numbers, "minItems": robot.proprio_dim, "maxItems": robot.proprio_dim}
    sentence = {"type": "string", "minLength": 1, "maxLength": config.max_instruction_bytes, "pattern": "\\S"}
    request = {
        "type": "object",
        "required": names.needed,
        "properties": {
            **{camera: {**_ARRAY, "description": "uint8 (H, W, 3)"} for camera in names.cameras},
            **({} if names.state is None else {names.state: {"anyOf": [_ARRAY, state]}}),
            names.instruction: sentence,
            **_ABOUT_SCHEMA,
        },
    }
    encoded = {
        "type": "object",
        "required": ["encoded"],
        "properties": {"encoded": {"type": "string", "description": "the request as JSON text"}},
        "additionalProperties": False,
    }
    actions = {"type": "array", "items": _ARRAY, "description": f"float64 ({robot.action_dim},) per step"}
    reply = {"anyOf": [actions, {"type": "string", "description": "the same as JSON text, where the request was"}]}
    return {
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"anyOf": [request, encoded]}}},
            }
        },
        "responses": {
            200: {"description": "The action chunk.", "content": {"application/json": {"schema": reply}}},
            **{status: {"model": Error, "description": what} for status, what in _REFUSALS.items()},
        },
        "response_model": None,
    }
