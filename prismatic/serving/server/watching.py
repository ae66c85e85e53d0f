"""Tells watchers what happens, in a thread of its own and never in an answer's way."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from prismatic.serving.server.events import Answered, Event, Watcher

logger = logging.getLogger(__name__)

_MOST_EVENTS, _MOST_BYTES = 256, 256 * 2**20
"""What may wait for slow watchers: events, and bytes of their pictures."""
_SILENCE_S = 10.0
"""Seconds between two lines of the log about events that were missed."""


class Watching:
    """Passes events on to all watchers, in order. What comes while too much waits is dropped and counted."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)
        self._waiting: deque[Event] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._said, self._unsaid = float("-inf"), 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="watchers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Returns at once; any thread may call it."""
        if not self._watchers:
            return
        with self._changed:
            if len(self._waiting) >= _MOST_EVENTS or self._bytes + _size(event) > _MOST_BYTES:
                self._drop()
                return
            self._waiting.append(event)
            self._bytes += _size(event)
            self._changed.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Tell what waits, then let every watcher close."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("watchers are still busy; they are left alone")

    def _drop(self) -> None:
        self.dropped += 1
        self._unsaid += 1
        if time.monotonic() - self._said > _SILENCE_S:
            logger.warning("watchers are too slow: %d events were not told to them", self._unsaid)
            self._said, self._unsaid = time.monotonic(), 0

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    break
                event = self._waiting.popleft()
                self._bytes -= _size(event)
            for watcher in self._watchers:
                try:
                    watcher.tell(event)
                except Exception:
                    logger.exception("%s failed over an event", type(watcher).__name__)
        for watcher in self._watchers:
            try:
                watcher.close()
            except Exception:
                logger.exception("%s failed to close", type(watcher).__name__)


def _size(event: Event) -> int:
    return sum(array.nbytes for array in event.observation.values()) if isinstance(event, Answered) else 0
