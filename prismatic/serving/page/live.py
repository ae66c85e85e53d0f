"""The last minute of a policy server in bounded memory, and the feed of those who look at its page."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from prismatic.serving.server.events import Answered, ConnectionChanged, Event, Refused

KEPT_S = 60.0
"""How far back a page can step, counted from the newest moment."""
CLIENT_RATE_HZ, TOTAL_RATE_HZ = 10.0, 30.0
"""At most so many moments a second are kept of one client and of all; what comes faster is answered and not shown."""
MAX_MOMENTS = int(TOTAL_RATE_HZ * KEPT_S)
EXACT_BYTES = 256 * 2**20
"""The newest moments keep the observation as it came, for episode records, up to so many bytes of pictures."""
PICTURE_SIDE, JPEG_QUALITY = 384, 85
"""What a page shows: pictures whose longer side is at most so many pixels."""

_MAX_TEXT, _MAX_LISTED, _BURST = 1000, 50, 3.0
_SILENT_S = 3.0
_WAITING_MOMENTS = 20


class Pace:
    """Lets through `rate` a second on average, and up to `_BURST` at once."""

    def __init__(self, rate: float) -> None:
        self._rate, self._tokens, self._last = rate, _BURST, 0.0

    def allows(self, now: float) -> bool:
        """Whether one more may pass at `now`, in seconds of a clock that does not go back."""
        self._tokens = min(_BURST, self._tokens + (now - self._last) * self._rate)
        self._last = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


@dataclass(eq=False)
class Moment:
    """One answered policy query as the page shows it.

    Attributes:
        number: counts the kept moments from 1, and names this one in addresses.
        client: who asked, `Answered.connection`.
        text: JSON of everything but the pictures.
        pictures: camera -> JPEG.
        event: as it was told; None once its pictures no longer fit into `EXACT_BYTES`.
    """

    number: int
    time: float
    client: str
    text: str
    pictures: dict[str, bytes]
    event: Answered | None
    exact_bytes: int


@dataclass
class Client:
    """One who asks, as the page lists it."""

    name: str
    address: str = ""
    is_open: bool = True
    was_announced: bool = False
    session: str = ""
    answered: int = 0
    last: float = 0.0
    pace: Pace = field(default_factory=lambda: Pace(CLIENT_RATE_HZ))

    def to_json(self) -> dict[str, Any]:
        names = ("name", "address", "is_open", "session", "answered", "last")
        return {name: getattr(self, name) for name in names}


class Subscription:
    """What one page has yet to be sent; lives on the event loop that made it.

    Attributes:
        chosen: the client whose moments are wanted; None follows whoever asks.
        following: the client whose moments are put in.
    """

    def __init__(self, chosen: str | None, following: str | None) -> None:
        self.chosen, self.following = chosen, following
        self.ended = False
        self._waiting: deque[Moment] = deque(maxlen=_WAITING_MOMENTS)  # a slow page misses moments, the oldest first
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._last = time.monotonic()

    def wants(self, moment: Moment) -> bool:
        """Whether the moment is of the client that is shown; under None another client's turn comes after a silence."""
        now = time.monotonic()
        silent = now - self._last > _SILENT_S
        may_switch = self.chosen is None and (silent or self.following is None)
        if moment.client != self.following and not may_switch:
            return False
        self._last, self.following = now, moment.client
        return True

    def put(self, moment: Moment) -> None:
        """From any thread."""
        self._waiting.append(moment)
        self._wake()

    def end(self) -> None:
        """From any thread: nothing more will come."""
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)

    async def take(self, timeout_s: float) -> list[Moment]:
        """The moments that have come, in order; none where none comes within `timeout_s`."""
        if not self._waiting and not self.ended:
            try:
                await asyncio.wait_for(self._news.wait(), timeout_s)
            except asyncio.TimeoutError:
                return []
        self._news.clear()
        taken = []
        while self._waiting:
            taken.append(self._waiting.popleft())
        return taken


class LiveFeed:
    """A `Watcher` (`server/events.py`) that keeps the last minute and tells pages of it.

    Moments are encoded in the thread that tells events, also while nobody looks, or a page that is opened late could
    not step back; the rates above bound what that costs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moments: deque[Moment] = deque()
        self._exact: deque[Moment] = deque()
        self._exact_bytes = 0
        self._clients: dict[str, Client] = {}
        self._refused: deque[Refused] = deque(maxlen=_MAX_LISTED)
        self._counts = {"answered": 0, "refused": 0, "not_shown": 0}
        self._pace = Pace(TOTAL_RATE_HZ)
        self._number = 0
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    def tell(self, event: Event) -> None:
        """Take note of one event."""
        if isinstance(event, Answered):
            self._answered(event)
            return
        with self._lock:
            if isinstance(event, Refused):
                self._refused.append(event)
                self._counts["refused"] += 1
            else:
                self._connection(event)

    def close(self) -> None:
        """End every page's feed."""
        with self._lock:
            self._closed = True
            ended = list(self._subscriptions)
        for subscription in ended:
            subscription.end()

    def subscribe(self, chosen: str | None) -> tuple[Subscription, list[Moment]]:
        """A page's share of what comes, and what there is of its client so far. Call it on the event loop."""
        with self._lock:
            newest = self._moments[-1].client if self._moments else None
            subscription = Subscription(chosen, chosen if chosen is not None else newest)
            subscription.ended = self._closed
            self._subscriptions.add(subscription)
            return subscription, self._of(subscription.following)

    def unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions.discard(subscription)

    @property
    def num_pages(self) -> int:
        """How many pages follow."""
        return len(self._subscriptions)

    def moments(self, client: str | None) -> list[Moment]:
        """The kept moments of one client, oldest first."""
        with self._lock:
            return self._of(client)

    def find(self, number: int) -> Moment | None:
        """The kept moment of that number."""
        with self._lock:
            if not self._moments:
                return None
            place = number - self._moments[0].number  # numbers follow one another
            return self._moments[place] if 0 <= place < len(self._moments) else None

    def status(self) -> dict[str, Any]:
        """Who is there and what was refused, for JSON."""
        with self._lock:
            recent = sorted(self._clients.values(), key=lambda client: -client.last)[:_MAX_LISTED]
            return {
                "time": time.time(),
                "clients": [client.to_json() for client in recent],
                "refusals": [
                    {"time": r.time, "client": r.connection, "code": r.code, "reason": _cut(r.reason)}
                    for r in self._refused
                ],
                **self._counts,
            }

    def _of(self, client: str | None) -> list[Moment]:
        return [moment for moment in self._moments if moment.client == client]

    def _connection(self, event: ConnectionChanged) -> None:
        client = self._clients.setdefault(event.connection, Client(event.connection))
        client.address, client.is_open, client.was_announced = event.address, event.is_open, True
        client.last = max(client.last, event.time)
        self._forget_clients()

    def _forget_clients(self) -> None:
        """Those that have gone, or whose coming and going nobody tells, and of whom no moment is left."""
        oldest = time.time() - KEPT_S
        gone = [c.name for c in self._clients.values() if c.last < oldest and not (c.is_open and c.was_announced)]
        for name in gone:
            del self._clients[name]

    def _answered(self, event: Answered) -> None:
        with self._lock:
            self._counts["answered"] += 1
            if event.connection not in self._clients:
                self._forget_clients()
            client = self._clients.setdefault(event.connection, Client(event.connection))
            client.answered += 1
            client.last, client.session = event.time, _cut(event.session)
            now = time.monotonic()
            if not (client.pace.allows(now) and self._pace.allows(now)):
                self._counts["not_shown"] += 1
                return
            self._number += 1
            number = self._number
        moment = make_moment(number, event)
        with self._lock:
            self._keep(moment)
            told = [subscription for subscription in self._subscriptions if subscription.wants(moment)]
        for subscription in told:
            subscription.put(moment)

    def _keep(self, moment: Moment) -> None:
        self._moments.append(moment)
        self._exact.append(moment)
        self._exact_bytes += moment.exact_bytes
        while len(self._moments) > MAX_MOMENTS or self._moments[0].time < moment.time - KEPT_S:
            old = self._moments.popleft()
            if self._exact and self._exact[0] is old:
                self._forget_exact()
        while self._exact_bytes > EXACT_BYTES:
            self._forget_exact()

    def _forget_exact(self) -> None:
        old = self._exact.popleft()
        self._exact_bytes -= old.exact_bytes
        old.event = None


def make_moment(number: int, event: Answered) -> Moment:
    """Encodes an event for the page."""
    views = {key: value for key, value in event.observation.items() if np.ndim(value) == 3}
    kept = None if event.kept is None else np.asarray(event.kept)
    about = {
        "number": number,
        "time": event.time,
        "client": event.connection,
        "session": _cut(event.session),
        "query": event.query,
        "request": event.request_id,
        "instruction": _cut(event.instruction),
        "cameras": list(views),
        "actions": np.round(event.actions, 5).tolist(),
        "tokens": None if kept is None else int(kept.size),
        "kept": None if kept is None else np.packbits(kept).tobytes().hex(),
        "kept_of_camera": None if kept is None else _per_camera(kept, len(views)),
        "warnings": [_cut(sentence) for sentence in event.warnings[:_MAX_LISTED]],
        "timing": {name: round(float(value), 3) for name, value in event.timing.items()},
    }
    return Moment(
        number=number,
        time=event.time,
        client=event.connection,
        text=json.dumps(about),
        pictures={camera: encode_view(view) for camera, view in views.items()},
        event=event,
        exact_bytes=sum(np.asarray(view).nbytes for view in views.values()),
    )


def encode_view(view: NDArray[np.uint8], side: int = PICTURE_SIDE) -> bytes:
    """(H, W, 3) -> a JPEG whose longer side is at most `side` pixels."""
    height, width = view.shape[:2]
    if max(height, width) > side:
        scale = side / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        view = np.asarray(Image.fromarray(view).resize(size, Image.Resampling.BILINEAR))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(view), quality=JPEG_QUALITY)


def _per_camera(kept: NDArray[np.bool_], cameras: int) -> list[int] | None:
    """How many tokens of each picture stayed; None where they are not the same number of tokens per picture."""
    if not cameras or kept.size % cameras:
        return None
    return [int(count) for count in kept.reshape(cameras, -1).sum(1)]


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


RecordMaker = Callable[[Answered], bytes]
"""Makes the file of an episode record of a single moment."""
