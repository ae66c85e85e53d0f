"""Simulator processes around one agent: they simulate side by side and query the agent in batches."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from experiments.robot.libero.policies.contract import PolicyQuery, Queryable, timed_query
from experiments.robot.libero.policies.watched import PolicyLost
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.machine import WORKER_BYTES
from experiments.robot.libero.rollouts.rollout import new_record
from experiments.robot.libero.rollouts.runner import EpisodeSettings, no_space
from experiments.robot.libero.rollouts.schedule import Schedule
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.rollouts.worker import AgentFailed, DiskFull, Ready

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[4]
# Not `-m`: pickled objects must name the module that they come from, not `__main__`.
# Interrupts are the parent's to handle, from before the imports on.
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from experiments.robot.libero.rollouts.worker import main; main(int(sys.argv[1]))"
)
_POLL_SECONDS = 1.0
_STILLBORN_LIMIT = 3  # as many processes in a row (or all) that die before they are ready mean that none will ever be
_GONE = (EOFError, OSError)


class SimulatorsUnusable(RuntimeError):
    """No simulator process gets as far as a first rollout."""


class WorkerPool:
    """Runs a schedule with several simulator processes; use it as a context manager.

    A process that dies, or sends nothing for `timeout_s` seconds while it is its turn, is replaced, and its start is
    tried again. One that was killed is not replaced where others are left: that is how a system without memory ends
    processes. The pool forms batches from whoever waits at the moment, at most `batch_size` queries each; with 1
    every action chunk is computed alone, exactly as without workers.

    Raises (while running):
        SimulatorsUnusable: when processes cannot start at all.
        PolicyLost: as the agent.
        OSError: ENOSPC, when a process could not save a video or a record for want of space.
    """

    def __init__(
        self, settings: EpisodeSettings, agent: Queryable, num_workers: int, timeout_s: float, batch_size: int = 1
    ) -> None:
        self._settings = settings
        self._agent = agent
        self._timeout_s = timeout_s
        self._batch_size = batch_size
        self._stillborn, self._any_ready = 0, False
        self._listened = time.monotonic()
        self._workers = [_Worker(settings, timeout_s) for _ in range(num_workers)]
        self.restarts = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def run(self, schedule: Schedule) -> Iterator[EpisodeRecord]:
        """Yield a record for every start of the schedule, in the order in which they end."""
        while not schedule.is_done:
            for worker in self._workers:
                if worker.is_idle and (start := schedule.take(worker.last_start)) is not None:
                    worker.give(start)
            queries: list[tuple[_Worker, PolicyQuery]] = []
            for worker in self._workers_with_news():
                try:
                    message = worker.receive()
                except _GONE:
                    yield from self._replace(worker, schedule, f"the simulator process {worker.ending()}")
                    continue  # its successor is heard from next time
                if isinstance(message, PolicyQuery):
                    queries.append((worker, message))
                elif isinstance(message, EpisodeRecord):
                    if schedule.settle(worker.free(), message):
                        yield message
                elif isinstance(message, DiskFull):
                    raise no_space(self._settings.output_dir)
                elif isinstance(message, Ready):
                    self._stillborn, self._any_ready = 0, True
            for position in range(0, len(queries), self._batch_size):
                self._serve(queries[position : position + self._batch_size])
            for worker in [worker for worker in self._workers if worker.silence > self._timeout_s]:
                reason = f"the simulator process sent nothing for {self._timeout_s:g} seconds"
                yield from self._replace(worker, schedule, reason)

    def _workers_with_news(self) -> list[_Worker]:
        by_connection = {worker.connection: worker for worker in self._workers}
        ready = wait(list(by_connection), _POLL_SECONDS)
        # Time spent on queries counts too, else a busy policy would never notice. But only so much at once: a slow
        # policy, or a job that was stopped for an hour, is no worker's silence.
        before, self._listened = self._listened, time.monotonic()
        passed = min(self._listened - before, 2 * _POLL_SECONDS)
        for connection, worker in by_connection.items():
            worker.silence = 0.0 if worker.is_idle or connection in ready else worker.silence + passed
        # In a fixed order, so that batches depend on who waits and on nothing else.
        return [worker for connection, worker in by_connection.items() if connection in ready]

    def _serve(self, waiting: list[tuple[_Worker, PolicyQuery]]) -> None:
        """Send a batch to the agent; where that fails, each by itself: one bad query spoils no other rollout."""
        replies: list[Any]
        try:
            replies = timed_query(self._agent, [query for _, query in waiting])
            if len(replies) != len(waiting):
                raise RuntimeError(f"the agent gave {len(replies)} action chunks for {len(waiting)} policy queries")
        except PolicyLost:
            raise
        except Exception:
            if len(waiting) > 1:
                for one in waiting:
                    self._serve([one])
                return
            replies = [AgentFailed(traceback.format_exc())]
        for (worker, _), reply in zip(waiting, replies, strict=True):
            worker.reply(reply)

    def _replace(self, worker: _Worker, schedule: Schedule, reason: str) -> Iterator[EpisodeRecord]:
        """Start another process in place of one that is of no use any more."""
        start, others = worker.start, len(self._workers) - 1
        was_killed = worker.process.returncode == -signal.SIGKILL  # by somebody else: `close` comes later
        words = worker.last_words()
        worker.close()
        if not worker.was_ready:
            self._stillborn += 1
            # One that ends with an error before any was ready says how all will end.
            hopeless = worker.failed and not self._any_ready
            if self._stillborn >= (1 if hopeless else max(_STILLBORN_LIMIT, others + 1)):
                raise SimulatorsUnusable(f"{reason} before it was ready{words}")
        self.restarts += 1
        place = self._workers.index(worker)
        if was_killed and others:
            del self._workers[place]
            logger.warning("%s; going on with %d", reason, others)
        else:
            logger.warning("%s; starting another", reason)
            self._workers[place] = _Worker(self._settings, self._timeout_s)
        if start is not None:
            record = new_record(start, self._settings.rollout.control)
            record.invalid = f"{reason} during the rollout{words}"
            if schedule.settle(start, record):
                yield record


class _Worker:
    """One simulator process and what it is doing."""

    def __init__(self, settings: EpisodeSettings, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        # A process can also stop in the middle of a message.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", max(1, math.ceil(timeout_s)), 0))
        self.connection = Connection(ours.detach())
        # The processes are the parallelism: one thread each, Mesa's software renderer included.
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **single, "PYTHONPATH": path},
                stderr=self._words,
            )
        self.start: Start | None = None
        self.last_start: Start | None = None
        self.was_ready = self.failed = False
        self.silence = 0.0  # seconds for which it has been this process's turn to send something, and it has not
        self._send(settings)

    @property
    def is_idle(self) -> bool:
        return self.was_ready and self.start is None

    def give(self, start: Start) -> None:
        self.start = self.last_start = start
        self._send(start)

    def reply(self, chunk: Any) -> None:
        self._send(chunk)

    def receive(self) -> Any:
        message = self.connection.recv()
        self.was_ready = True
        return message

    def free(self) -> Start:
        """The worker has ended its start, which is returned."""
        start, self.start = self.start, None
        assert start is not None
        return start

    def ending(self) -> str:
        """How the process ended, as text."""
        try:
            status = self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return "closed its pipe, or stopped in the middle of a message"
        self.failed = status > 0
        if status == -signal.SIGKILL:
            return (
                "was killed by signal 9, as the system does when memory runs out (a simulator takes up to "
                f"{WORKER_BYTES / 2**30:.1f} GiB: fewer --num_envs need less)"
            )
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def last_words(self) -> str:
        """The last line that the process wrote to its standard error, as the rest of a sentence."""
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()}" if lines else ""

    def kill(self) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process inside a driver may not end at once
            self.process.wait(timeout=60)
        self.connection.close()

    def close(self) -> None:
        """End the process, and forget what it said."""
        self.kill()
        self._words.close()

    def _send(self, message: Any) -> None:
        self.silence = 0.0
        try:
            self.connection.send(message)
        except OSError:
            self.process.kill()  # gone, or stuck: the next `receive` notices
