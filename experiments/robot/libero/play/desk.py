"""The server's side of play: starts the simulator's process, sends it what a person wants, and says how it stands."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments.robot.libero.play.messages import Begin, PlaySettings, Run, Status

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[4]
# Not `-m`: pickled objects must name the module that they come from, not `__main__`. Interrupts are the parent's.
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from experiments.robot.libero.play.robot import main; main(int(sys.argv[1]))"
)


class Desk:
    """Holds the pipe to the simulator's process. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._settings: PlaySettings | None = None
        self._status = Status()
        self._words: Any = None

    def start(self, settings: PlaySettings) -> None:
        """Start the simulator's process; returns at once."""
        with self._lock:
            self._settings = settings
            self._start(settings)

    def status(self) -> dict[str, Any]:
        """How the robot stands, for JSON."""
        return asdict(self._status)

    def send(self, command: Begin | Run) -> None:
        """Pass a command on; a process that has died is replaced first."""
        with self._lock:
            if self._settings is None:
                raise RuntimeError("the simulator was never started")
            if self._process is None or self._process.poll() is not None:
                self._start(self._settings)
            assert self._connection is not None
            self._connection.send(command)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._settings = None
            if self._connection is not None:
                self._connection.close()
            if self._process is not None:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # a process inside a driver may not end at once
                    self._process.wait(timeout=10)

    def _start(self, settings: PlaySettings) -> None:
        ours, theirs = socket.socketpair()
        connection = Connection(ours.detach())
        # One thread each for the simulator and Mesa's renderer: the policy computes beside them.
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        words = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **single, "PYTHONPATH": path},
                stderr=words,
            )
        self._status = replace(self._status, phase="starting", said="")
        self._process, self._connection = process, connection
        connection.send(settings)
        threading.Thread(target=self._listen, args=(process, connection, words), name="play", daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes], connection: Connection, words: Any) -> None:
        """Follow one process to its end."""
        with words:
            try:
                while True:
                    self._status = connection.recv()
            except (EOFError, OSError):
                pass
            if self._settings is None:
                return
            code = process.wait()
            words.seek(0)
            lines = words.read().decode(errors="replace").strip().splitlines()
            logger.warning("the simulator's process ended with status %d:\n%s", code, "\n".join(lines[-20:]))
            last = f": {lines[-1].strip()}" if lines else ""
            said = f"the simulator's process ended with status {code}{last}; begin again to start another"
            self._status = replace(self._status, phase="failed", said=said)
