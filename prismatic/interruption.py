"""Ctrl+C that is not lost: libraries catch it in a bare `except` as they are imported, Python in a `__del__`."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_has_come = False


@contextmanager
def noticed() -> Iterator[None]:
    """Within the block it is noted that SIGINT came, which raises KeyboardInterrupt as ever (`raise_swallowed`).

    What Python says of one that it drops, a traceback, is not said. In another thread than the main one, and where
    somebody else handles SIGINT, nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    tell = sys.unraisablehook

    def tell_others(dropped: "sys.UnraisableHookArgs") -> None:
        if not (_has_come and dropped.exc_type is KeyboardInterrupt):
            tell(dropped)

    signal.signal(signal.SIGINT, _note)
    sys.unraisablehook = tell_others
    try:
        yield
    finally:
        sys.unraisablehook = tell
        signal.signal(signal.SIGINT, signal.default_int_handler)
        forget()


def _note(number: int, frame: FrameType | None) -> None:
    global _has_come
    _has_come = True
    raise KeyboardInterrupt


def raise_swallowed() -> None:
    """Raises KeyboardInterrupt where one has come, but has not arrived here."""
    if _has_come:
        forget()
        raise KeyboardInterrupt


def forget() -> None:
    """It has arrived."""
    global _has_come
    _has_come = False
