"""Puts a policy server together: one ASGI application of routes, gate, queue and watchers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import prismatic
from prismatic.serving.server.access import Gate, json_error
from prismatic.serving.server.events import Watcher
from prismatic.serving.server.http import build_router
from prismatic.serving.server.payloads import Refusal
from prismatic.serving.server.served import ServedPolicy
from prismatic.serving.server.service import Exchange, Service
from prismatic.serving.server.websocket import converse
from prismatic.serving.settings import Secrets, ServerConfig


def build_application(
    served: ServedPolicy,
    config: ServerConfig,
    watchers: Sequence[Watcher] = (),
    routers: Sequence[APIRouter] = (),
    secrets: Secrets = Secrets(),  # noqa: B008 (it cannot change)
) -> FastAPI:
    """The application that answers for a policy; its queue and watchers run from its startup to its shutdown.

    Args:
        served: the policy.
        config: limits.
        watchers: told of every event.
        routers: more routes, a page's; the gate stands before them, too, and they go before the WebSocket, which
            answers on every path that is nobody else's.
        secrets: the key.
    """
    service = Service(served, config, watchers)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.finish()
            service.close()

    application = FastAPI(
        title="LightVLA policy server",
        version=prismatic.__version__,
        lifespan=lifespan,
        docs_url=None,  # these load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # to an address made of what the client calls this server
    )
    application.state.service = service
    for router in (build_router(service), *routers):
        application.include_router(router)

    @application.websocket("/{path:path}")
    async def ask(websocket: WebSocket) -> None:
        await converse(websocket, service)

    @application.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        return json_error(error.status_code, str(error.detail), error.headers)

    @application.exception_handler(RequestValidationError)
    async def refuse_values(_: Request, error: RequestValidationError) -> Response:
        return json_error(422, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]))

    def refused(protocol: str, address: str, refusal: Refusal) -> None:
        service.refused(Exchange(protocol, address), refusal)

    application.add_middleware(Gate, config=config, secrets=secrets, refused=refused)
    return application
