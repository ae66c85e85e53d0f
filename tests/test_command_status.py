"""What a command says when it cannot do its work, and how it ends."""

import gc
import os
import signal
import subprocess
import sys

import pytest

from prismatic import command_status
from prismatic.command_status import noticing_ctrl_c, print_error, raise_swallowed_ctrl_c


def test_an_error_is_one_line_of_text_on_stderr(capsys: pytest.CaptureFixture[str]):
    words = f"[bold]{'long ' * 60}[/] it's a --flag of /a/path"
    print_error(ValueError(words))
    assert capsys.readouterr() == ("", f"error: {words}\n")


def test_statuses_are_those_that_are_documented():
    found = {name: value for name, value in vars(command_status).items() if name.isupper()}
    assert found == {"UNWANTED": 1, "UNUSABLE": 2, "INVALID": 3, "PREEMPTED": 75, "STOPPED": 130}


def test_an_unknown_command_ends_so_without_torch():
    code = "import sys\nfrom lightvla.__main__ import main\nstatus = main()\nprint('torch' in sys.modules)\n"
    code += "sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code, "evall"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (command_status.UNUSABLE, "False\n")
    assert done.stderr.startswith("error: unknown command 'evall'\n\nusage: lightvla COMMAND")


class Interrupted:
    """Ctrl+C comes while it is collected."""

    def __del__(self) -> None:
        press_ctrl_c()


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10**6):
        pass  # Python runs handlers between its instructions


def test_what_a_bare_except_takes_is_raised_again_once() -> None:
    with noticing_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            raise_swallowed_ctrl_c()
        raise_swallowed_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_dropped_in_a_finalizer_is_raised_again_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), noticing_ctrl_c():
        Interrupted()
        gc.collect()
        raise_swallowed_ctrl_c()
    assert sys.unraisablehook is before and capsys.readouterr().err == ""


def test_nothing_is_left_of_what_came_within() -> None:
    with pytest.raises(KeyboardInterrupt), noticing_ctrl_c():
        press_ctrl_c()
    raise_swallowed_ctrl_c()
    with noticing_ctrl_c():
        raise_swallowed_ctrl_c()
