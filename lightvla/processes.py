"""Starting the project's own commands as processes, and ending them: for drivers of several, as the demo is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGES = Path(__file__).resolve().parents[1]
"""Where this package and the others lie."""
_MODULES = {"lightvla": "lightvla", "torchrun": "torch.distributed.run"}


def start(
    command: list[str], log: Path | None = None, *, append: bool = False, one_thread: bool = True
) -> subprocess.Popen:
    """Start one of the project's commands with this interpreter; output goes to `log`, else to the terminal.

    Args:
        command: as a person would type it; its first word is `lightvla` or `torchrun`.
        append: to the log instead of beginning it anew.
        one_thread: a command with a log is one of as many beside each other as there are cores: one thread each, Mesa's
            renderer included.
    """
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    if log is not None:
        if one_thread:
            environment |= {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
        log.parent.mkdir(parents=True, exist_ok=True)
    output = None if log is None else log.open("a" if append else "w")
    try:
        return subprocess.Popen(
            [sys.executable, "-m", _MODULES[command[0]], *command[1:]],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
        )
    finally:
        if output is not None:
            output.close()


def end(*processes: subprocess.Popen) -> None:
    """Ask those that still run to end, and wait for that."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def evaluation_progress(directory: Path) -> tuple[int, int]:
    """How many rollouts an evaluation's folder holds so far, and how many of them succeeded."""
    try:
        episodes = json.loads((directory / "results.json").read_text())["episodes"]
    except (FileNotFoundError, json.JSONDecodeError):
        return 0, 0
    return len(episodes), sum(bool(episode["success"]) for episode in episodes)
