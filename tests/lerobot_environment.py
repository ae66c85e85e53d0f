"""An environment with lerobot as the registry has it: it needs other versions of our libraries, so it has its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# lerobot declares what training needs, which takes gigabytes; its writer needs these. Version 0.4 writes v3.0.
WRITER = "lerobot>=0.4.4,<0.5"
REQUIREMENTS = (
    "datasets>=4,<5",
    "pandas",
    "jsonlines",
    "einops",
    "draccus",
    "deepdiff",
    "termcolor",
    "gymnasium",
    "av>=15",
)
PEER = Path(__file__).resolve().parent / "lerobot_peer.py"


def own_environment() -> dict[str, str]:
    """Without this process's PYTHONPATH; nothing is asked of the hub."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {"HF_HUB_OFFLINE": "1"}


def lerobot_interpreter(config: pytest.Config) -> Path:
    """The interpreter of that environment, made once, in pytest's cache; torch is this environment's.

    `LEROBOT_PYTHON` names another one. Skips the test where pip cannot make it.
    """
    if given := os.environ.get("LEROBOT_PYTHON"):
        return Path(given)
    cache = config.cache
    assert cache is not None
    folder = cache.mkdir(f"lerobot-{sys.version_info.major}.{sys.version_info.minor}")
    python, complete = folder / "bin" / "python", folder / "complete"
    if complete.exists() and complete.read_text() == " ".join((WRITER, *REQUIREMENTS)):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, env=own_environment())
    pip = [str(python), "-m", "pip", "install", "--quiet", "--retries", "1"]
    for command in ([*pip, "--no-deps", WRITER], [*pip, *REQUIREMENTS]):
        installed = subprocess.run(command, capture_output=True, text=True, env=own_environment())
        if installed.returncode != 0:
            pytest.skip(f"pip cannot install lerobot here: {installed.stderr.strip().splitlines()[-1]}")
    import torch

    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    complete.write_text(" ".join((WRITER, *REQUIREMENTS)))
    return python
