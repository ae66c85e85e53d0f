"""Signals that ask a run to end: it finishes its step, saves and says so by its exit status."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Schedulers send the first before they kill and the last when asked for a warning; people send the second."""
_SECOND_PRESS_S = 1.0
"""torchrun passes on what a terminal has sent already; what comes later is a person who does not want to wait."""


class Preempted(Exception):
    """The run was asked to end, and what it had done is saved.

    Attributes:
        signal: its name, of the first process that was asked.
        step: the last finished step.
    """

    def __init__(self, name: str, step: int) -> None:
        super().__init__(name, step)
        self.signal = name
        self.step = step


class StopRequest:
    """Whether this process was asked to end, once it listens."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._asked_at = 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None and time.monotonic() - self._asked_at > _SECOND_PRESS_S
        if again and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._asked_at = signal.Signals(number).name, time.monotonic()
            log.warning("%s: finishing the step, then saving", self.signal)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the signals are noted, outside it they end the process: nothing can be lost there.

        Python calls a handler between two of its own instructions, so before processes have met it would be called too
        late: they wait for each other inside torch. Outside a process's main thread no signal can be taken.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """For a process that loads data: its parent decides when to end, and needs it for the step that is running."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
