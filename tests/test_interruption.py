"""Ctrl+C comes, and somebody else takes it."""

import gc
import os
import signal
import sys

import pytest

from prismatic.interruption import noticed, raise_swallowed


class Interrupted:
    """Ctrl+C comes while it is collected."""

    def __del__(self) -> None:
        press_ctrl_c()


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10**6):
        pass  # Python runs handlers between its instructions


def test_what_a_bare_except_takes_is_raised_again_once() -> None:
    with noticed():
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            raise_swallowed()
        raise_swallowed()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_dropped_in_a_finalizer_is_raised_again_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), noticed():
        Interrupted()
        gc.collect()
        raise_swallowed()
    assert sys.unraisablehook is before and capsys.readouterr().err == ""


def test_nothing_is_left_of_what_came_within() -> None:
    with pytest.raises(KeyboardInterrupt), noticed():
        press_ctrl_c()
    raise_swallowed()
    with noticed():
        raise_swallowed()
