"""Records of what a policy server answers, a file per episode of each session."""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismatic.recordings.recording import Facts, write_recording
from prismatic.recordings.rows import UNFINISHABLE, Row, RowFolder, finish_leftovers
from prismatic.serving.server.events import Answered, ConnectionChanged, Event
from prismatic.vla.robots import RobotSpec

logger = logging.getLogger(__name__)

MAX_ROWS = 1000
"""Policy queries in one file; a longer episode goes on in another part, so that reading one takes bounded memory."""
MAX_OPEN = 256
"""Episodes that go on at once; of more, the one that was silent longest is ended."""


@dataclass
class _Episode:
    """One that goes on: its rows, who asked last, when, and since when that connection is gone or asks for another."""

    rows: RowFolder
    instruction: str
    connection: str
    heard: float
    left: float | None = None


class ServerRecorder:
    """A `Watcher` that writes what a server answers into a folder.

    An episode ends when the query 0 of its session comes again; when its connection has closed or turned to another
    session and nothing is heard of its own for `quiet_s`; after `idle_s` of silence; and when the server stops. Another
    instruction, or pictures of another size, begin another part. Rows go to the disk as they come, and finished
    episodes are compressed in a thread of the recorder's own, so that neither memory nor the watchers' thread fills.

    Args:
        folder: of the records; made where it is missing. What an earlier process left unfinished there is finished.
        facts: gives what stands in every record that begins; a pruner may be changed.
        quiet_s, idle_s: seconds, see above.
        max_rows: policy queries in one file.
    """

    def __init__(
        self,
        folder: Path,
        facts: Callable[[], Facts],
        quiet_s: float = 5.0,
        idle_s: float = 600.0,
        max_rows: int = MAX_ROWS,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finish_leftovers(folder)
        self.folder, self._facts = folder, facts
        self._quiet_s, self._idle_s, self._max_rows = quiet_s, idle_s, max_rows
        self._open: dict[str, _Episode] = {}
        self._ended: list[tuple[RowFolder, NDArray[np.float64] | None]] = []
        self._count = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._finish_episodes, name="recorder", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Note an answer, or who has gone. Raises OSError where the disk takes no more."""
        with self._changed:
            now = time.monotonic()
            if isinstance(event, Answered):
                self._note(event, now)
            elif isinstance(event, ConnectionChanged) and not event.is_open:
                self._leave(event.connection, now, but="")
            self._changed.notify()

    def close(self) -> None:
        """End all episodes, and return when they are written."""
        with self._changed:
            for session in list(self._open):
                self._end(session)
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _note(self, answered: Answered, now: float) -> None:
        session, row = answered.session, row_of(answered)
        part = 1
        self._leave(answered.connection, now, but=session)
        if (episode := self._open.get(session)) is not None:
            assert episode.rows.last is not None  # `_begin` has written one
            again = answered.query == 0
            full = episode.rows.count >= self._max_rows
            if again or full or episode.instruction != answered.instruction or not row.fits(episode.rows.last):
                part = 1 if again else episode.rows.header["part"] + 1
                self._end(session, row.executed)
                episode = None
        if episode is None:
            self._begin(answered, row, part, now)
            return
        episode.rows.append(row)
        episode.connection, episode.heard, episode.left = answered.connection, now, None

    def _begin(self, answered: Answered, row: Row, part: int, now: float) -> None:
        """An episode and its first row, or none of it."""
        while len(self._open) >= MAX_OPEN:
            self._end(min(self._open, key=lambda session: self._open[session].heard))
        header = self._facts().header("server", answered.instruction, answered.session, part)
        rows = RowFolder.begin(self._new_path(answered, part), header)
        try:
            rows.append(row)
        except OSError:
            rows.discard()
            raise
        self._open[answered.session] = _Episode(rows, answered.instruction, answered.connection, now)

    def _new_path(self, answered: Answered, part: int) -> Path:
        """`20261126T201500_0003_arm1.npz`: when it began (UTC), its number here, its session."""
        began = datetime.fromtimestamp(answered.time, timezone.utc).strftime("%Y%m%dT%H%M%S")
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", answered.session)[:40]
        while True:
            self._count += 1
            path = self.folder / f"{began}_{self._count:04d}_{name}{f'_part{part}' if part > 1 else ''}.npz"
            if not (path.exists() or RowFolder(path, {}).folder.exists()):  # another server's, in the same folder
                return path

    def _leave(self, connection: str, now: float, but: str) -> None:
        """A connection has closed, or asks for another session."""
        for session, episode in self._open.items():
            if episode.connection == connection and session != but and episode.left is None:
                episode.left = now

    def _end(self, session: str, tail: NDArray[np.float64] | None = None) -> None:
        self._ended.append((self._open.pop(session).rows, tail))

    def _finish_episodes(self) -> None:
        """In the recorder's own thread: ends what is silent and writes what has ended, until all is closed."""
        while True:
            with self._changed:
                if not self._ended and not self._closing:
                    self._changed.wait(self._quiet_s / 2)
                    self._end_silent(time.monotonic())
                if not self._ended and self._closing:
                    return
                ended, self._ended = self._ended, []
            for rows, tail in ended:
                try:
                    rows.finish(tail)
                except UNFINISHABLE as error:
                    rows.unlock()
                    logger.error("%s is not written, its rows stay in %s: %s", rows.path, rows.folder, error)

    def _end_silent(self, now: float) -> None:
        for session, episode in list(self._open.items()):
            gone = episode.left is not None and now - episode.left >= self._quiet_s
            if gone or now - episode.heard >= self._idle_s:
                self._end(session)


def facts_of(info: Mapping[str, Any], versions: Mapping[str, str]) -> Facts:
    """What a server's `ServedPolicy.info()` says of its policy."""
    return Facts(RobotSpec.from_json(info["robot"]), info["center_crop"], info["policy"], versions)


def row_of(answered: Answered) -> Row:
    """An answer as a row of a record."""
    cameras = {key: value for key, value in answered.observation.items() if value.ndim == 3}
    states = [value for value in answered.observation.values() if value.ndim == 1]
    return Row(
        images=cameras,
        state=states[0] if states else np.zeros(0),  # a policy may read none
        time=answered.time,
        number=answered.query,
        executed=answered.executed,
        chunk=answered.actions,
        kept=answered.kept,
        picks=answered.picks,
        scores=answered.scores,
        warnings=answered.warnings,
    )


def one_moment(answered: Answered, facts: Facts) -> bytes:
    """A record of a single policy query, as the bytes of its file."""
    row, file = row_of(answered), io.BytesIO()
    header = {**facts.header("server", answered.instruction, answered.session), "warnings": [list(row.warnings)]}
    arrays: dict[str, NDArray] = {
        "states": np.asarray(row.state, np.float64)[None],
        "times": np.array([row.time]),
        "numbers": np.array([row.number]),
    }
    answers = {"chunks": row.chunk, "kept": row.kept, "picks": row.picks, "scores": row.scores}
    arrays |= {name: value[None] for name, value in answers.items() if value is not None}
    write_recording(file, header, arrays, {c: ((1, *p.shape), [p]) for c, p in row.images.items()})
    return file.getvalue()
