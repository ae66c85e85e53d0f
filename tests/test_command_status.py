"""What a command says when it cannot do its work, and how it ends."""

import subprocess
import sys

import pytest

from prismatic import command_status
from prismatic.command_status import print_error


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
