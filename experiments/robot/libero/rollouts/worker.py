"""A simulator process: runs the starts it is sent, and asks for actions through the same pipe.

Started by `worker_pool.py`, which holds the other end of the pipe. Messages are pickled objects between these two
processes only: `EpisodeSettings` once, then `Start` -> any number of (`PolicyQuery` -> `ActionChunk` or `AgentFailed`)
-> `EpisodeRecord`, or `DiskFull` at the end of everything. The process ends when the other end closes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.runner import EpisodeRunner, EpisodeSettings, is_full


@dataclass(frozen=True)
class Ready:
    """The process has started and waits for work."""


@dataclass(frozen=True)
class AgentFailed:
    """The agent returned no action chunk; `reason` is its traceback."""

    reason: str


@dataclass(frozen=True)
class DiskFull:
    """Nothing more can be saved; the process ends."""


class AgentError(RuntimeError):
    """The agent at the other end of the pipe returned no action chunk."""


class PipeAgent:
    """Asks the process that started this one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        chunks = []
        for query in queries:
            try:
                self._connection.send(query)
                reply = self._connection.recv()
            except (EOFError, OSError):
                sys.exit()  # nobody waits for this rollout any more, so it must not end as an invalid one
            if isinstance(reply, AgentFailed):
                raise AgentError(reply.reason)
            chunks.append(reply)
        return chunks


def serve(connection: Connection) -> None:
    """Run starts until the connection closes."""
    settings: EpisodeSettings = connection.recv()
    runner = EpisodeRunner(settings, PipeAgent(connection))
    try:
        message: Ready | EpisodeRecord | DiskFull = Ready()
        while True:
            try:
                connection.send(message)
                start = connection.recv()
            except (EOFError, OSError):
                return
            try:
                message = runner.run(start)
            except OSError as error:
                if not is_full(error):
                    raise
                message = DiskFull()
    finally:
        runner.close()


def main(descriptor: int) -> None:
    """Serve at one end of a socket pair, which this process has inherited."""
    with Connection(descriptor) as connection:
        serve(connection)
