"""How a command ends: its exit status, the line that says why it could not do what it was asked for, and Ctrl+C."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

UNWANTED = 1
"""It ran to its end, and what it found is not what one wants: a wrong checkpoint, another outcome, missing parts."""
UNUSABLE = 2
"""Flags, files or a checkpoint cannot be used. argparse ends so, too."""
INVALID = 3
"""Some rollouts of an evaluation say nothing about the policy."""
PREEMPTED = 75
"""A scheduler's signal ended it, and the same command goes on (EX_TEMPFAIL: try again)."""
STOPPED = 130
"""Interrupted (128 + SIGINT, as shells have it)."""


def print_error(message: object) -> None:
    """Write `error: ...` to stderr; the message is text, not markup, and never broken into lines."""
    console = Console(stderr=True)
    console.print("[bold red]error:[/] ", end="")
    console.print(str(message), markup=False, highlight=False, soft_wrap=True)


_has_come = False


@contextmanager
def noticing_ctrl_c() -> Iterator[None]:
    """Libraries take Ctrl+C in a bare `except` as they are imported, Python in a `__del__`; here it is not lost.

    Within the block it is noted that SIGINT came, which raises KeyboardInterrupt as ever (`raise_swallowed_ctrl_c`).

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
        _forget_ctrl_c()


def _note(number: int, frame: FrameType | None) -> None:
    global _has_come
    _has_come = True
    raise KeyboardInterrupt


def raise_swallowed_ctrl_c() -> None:
    """Raises KeyboardInterrupt where one has come, but has not arrived here."""
    if _has_come:
        _forget_ctrl_c()
        raise KeyboardInterrupt


def _forget_ctrl_c() -> None:
    """It has arrived."""
    global _has_come
    _has_come = False
