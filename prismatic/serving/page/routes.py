"""The page's addresses: the page itself, its feed by server-sent events, single moments and their records.

Server-sent events rather than a websocket: another site's script cannot read them (websockets know no same-origin
rule), the browser connects anew by itself, and nothing can be sent, since the page only watches.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.resources
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from prismatic.serving.page.live import KEPT_S, LiveFeed, Moment, RecordMaker
from prismatic.serving.server.service import Service
from prismatic.vla.crop import CROP_AREA

FILES = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "views.js": "text/javascript",
    "charts.js": "text/javascript",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
MAX_PAGES = 20
_STATUS_S = 1.0
_GONE = f"the server keeps the last {KEPT_S:.0f} s only; choose a later moment"


def page_router(feed: LiveFeed, make_record: RecordMaker | None = None, scripts: Sequence[str] = ()) -> APIRouter:
    """The page and what it asks for, a router of `build_application`.

    Args:
        feed: what it shows; give it to the server as a watcher too.
        make_record: makes the file that `GET /moments/NUMBER/record` sends; None: there is none.
        scripts: addresses of further modules of this server that the page loads, with controls of their own.
    """
    router = APIRouter(include_in_schema=False)
    page = _read("page.html").replace("<!-- scripts -->", "".join(map(_script, scripts)))

    @router.get("/")
    async def show() -> Response:
        return Response(page, media_type="text/html", headers=HEADERS)

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404, f"the page has no file {name!r}; it has {', '.join(FILES)}")
        return Response(_read(name), media_type=FILES[name], headers=HEADERS)

    @router.get("/feed")
    async def follow(request: Request, client: str | None = None) -> StreamingResponse:
        if feed.num_pages >= MAX_PAGES:
            raise HTTPException(429, f"{MAX_PAGES} pages follow this server already; close one")
        service: Service = request.app.state.service
        about = {"has_records": make_record is not None, "crop_area": CROP_AREA, "kept_s": KEPT_S}
        lines = _events(feed, lambda: {**about, "info": service.served.info()}, client, service.ending)
        return StreamingResponse(lines, media_type="text/event-stream", headers={**HEADERS, "X-Accel-Buffering": "no"})

    _add_moments(router, feed, make_record)
    return router


def _add_moments(router: APIRouter, feed: LiveFeed, make_record: RecordMaker | None) -> None:
    """What was answered at one moment: its text, its pictures, its record."""
    one_record = asyncio.Semaphore(1)  # compressing is the answers' time, too, where there are few cores

    @router.get("/moments")
    async def moments(client: str | None = None) -> Response:
        kept = feed.moments(client)
        return Response(_array(kept), media_type="application/json", headers=HEADERS)

    @router.get("/moments/{number}")
    async def moment(number: int) -> Response:
        return Response(_find(feed, number).text, media_type="application/json", headers=HEADERS)

    @router.get("/moments/{number}/views/{camera:path}")
    async def view(number: int, camera: str) -> Response:
        pictures = _find(feed, number).pictures
        if camera not in pictures:
            raise HTTPException(404, f"moment {number} has no camera {camera!r}; it has {', '.join(pictures)}")
        return Response(pictures[camera], media_type="image/jpeg", headers=HEADERS)

    @router.get("/moments/{number}/record")
    async def record(number: int) -> Response:
        if make_record is None:
            raise HTTPException(404, "this server writes no episode records of single moments")
        event = _find(feed, number).event
        if event is None:
            raise HTTPException(
                410, f"moment {number} is kept as the page shows it only; records hold its pictures as they came"
            )
        async with one_record:
            content = await run_in_threadpool(make_record, event)
        name = {"Content-Disposition": f'attachment; filename="moment_{number}.npz"'}
        return Response(content, media_type="application/octet-stream", headers={**HEADERS, **name})


def _read(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script(address: str) -> str:
    return f'<script type="module" src="{address}"></script>\n'


def _find(feed: LiveFeed, number: int) -> Moment:
    found = feed.find(number)
    if found is None:
        raise HTTPException(404, f"there is no moment {number}: {_GONE}")
    return found


def _array(moments: Sequence[Moment]) -> str:
    return f"[{','.join(moment.text for moment in moments)}]"


async def _events(
    feed: LiveFeed, facts: Callable[[], dict[str, Any]], chosen: str | None, ending: asyncio.Event
) -> AsyncIterator[str]:
    """The feed of one page: `facts` when they change, `status` each second, `history` of a client, then `moment`s.

    It ends soon after the server wants to end, which waits for it.
    """
    subscription, history = feed.subscribe(chosen)
    shown, said = subscription.following, ""
    loop = asyncio.get_running_loop()
    next_status = loop.time()
    try:
        yield _event("history", f'{{"client":{json.dumps(shown)},"moments":{_array(history)}}}')
        while not (subscription.ended or ending.is_set()):
            if loop.time() >= next_status:
                next_status = loop.time() + _STATUS_S
                if (now := json.dumps(facts(), default=str)) != said:
                    said = now
                    yield _event("facts", said)
                yield _event("status", json.dumps(feed.status()))
            for moment in await subscription.take(max(0.0, next_status - loop.time())):
                if moment.client != shown:
                    shown = moment.client
                    yield _event("history", f'{{"client":{json.dumps(shown)},"moments":{_array(feed.moments(shown))}}}')
                yield _event("moment", _with_pictures(moment))
    finally:
        feed.unsubscribe(subscription)


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"  # JSON holds no line break


def _with_pictures(moment: Moment) -> str:
    pictures = {camera: base64.b64encode(jpeg).decode("ascii") for camera, jpeg in moment.pictures.items()}
    return f'{{"moment":{moment.text},"pictures":{json.dumps(pictures)}}}'
