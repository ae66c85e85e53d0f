"""The command `lightvla`: its help, its dispatch, and that neither waits for torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightvla.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "timm", "mujoco", "robosuite", "tensorflow", "matplotlib"}

# Runs the command in this process and says what it imported, whatever way it ends.
PROBE = """
import atexit, sys
atexit.register(lambda: print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules})))
sys.argv = ["lightvla", *sys.argv[1:]]
from lightvla.__main__ import main
sys.exit(main())
"""


def answer(*words: str) -> tuple[int, str, str, set[str]]:
    """(status, output, errors, top-level modules that were imported)."""
    done = subprocess.run([sys.executable, "-c", PROBE, *words], cwd=ROOT, capture_output=True, text=True)
    output, _, modules = done.stdout.partition("IMPORTED ")
    return done.returncode, output, done.stderr, set(modules.split())


def test_the_list_of_commands_imports_nothing_of_others() -> None:
    status, output, errors, modules = answer("--help")
    assert status == 0 and not errors and all(f"  {name} " in output for name in COMMANDS)
    assert not modules & (HEAVY | {"numpy", "draccus"})


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_nothing_heavy(name: str) -> None:
    status, output, errors, modules = answer(name, "--help")
    assert status == 0 and not errors
    assert output.startswith(f"usage: lightvla {name} ") and "lightvla" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_flag_is_refused_before_anything_heavy(name: str) -> None:
    status, _, errors, modules = answer(name, "--no_such_flag", "1")
    assert status == 2 and "error" in errors and not modules & HEAVY


def test_an_unknown_command_lists_those_there_are() -> None:
    status, output, errors, _ = answer("evaluate")
    assert status == 2 and not output
    assert errors.startswith("error: unknown command 'evaluate'") and "  eval " in errors
