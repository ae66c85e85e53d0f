"""An environment with openpi-client 0.1.2 as the registry has it: it needs numpy < 2, so it has one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# openpi-client imports typing_extensions and does not say so.
REQUIREMENTS = ("openpi-client==0.1.2", "numpy<2", "typing_extensions")
PEER = Path(__file__).resolve().parent / "openpi_peer.py"


def own_environment() -> dict[str, str]:
    """Without this process's PYTHONPATH, whose packages are for another numpy."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def openpi_interpreter(config: pytest.Config) -> Path:
    """The interpreter of that environment, made once, in pytest's cache. Skips the test where pip cannot make it."""
    cache = config.cache
    assert cache is not None
    folder = cache.mkdir(f"openpi-client-{sys.version_info.major}.{sys.version_info.minor}")
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists() or complete.read_text() != " ".join(REQUIREMENTS):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, env=own_environment())
        command = [str(python), "-m", "pip", "install", "--quiet", "--retries", "1", *REQUIREMENTS]
        installed = subprocess.run(command, capture_output=True, text=True, env=own_environment())
        if installed.returncode != 0:
            pytest.skip(f"pip cannot install openpi-client here: {installed.stderr.strip().splitlines()[-1]}")
        complete.write_text(" ".join(REQUIREMENTS))
    return python
