"""What the machine, or the container around this process, lets this process use: cores, time and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60
"""Version 1 of control groups says "no limit" by a number near 2**63."""


@dataclass(frozen=True)
class Machine:
    """What this process may use.

    Args:
        cores: that it may run on.
        cpu_quota: cores' worth of time that its control group may take; None: no limit.
        memory_bytes: that can still be taken; None where nobody says (not on Linux).
    """

    cores: int
    cpu_quota: float | None = None
    memory_bytes: int | None = None


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_machine(root: Path = Path("/")) -> Machine:
    """What the system says now; `root` holds `proc` and `sys`."""
    quotas = [quota for group in _groups(root, "cpu") if (quota := _cpu_quota(group)) is not None]
    free = [left for group in _groups(root, "memory") if (left := _memory_left(group)) is not None]
    if (available := _field(root / "proc/meminfo", "MemAvailable:")) is not None:
        free.append(available * 2**10)
    return Machine(available_cores(), min(quotas, default=None), min(free, default=None))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups and of those around them, in version 1 and 2.

    Inside a container the path may be the host's, which is not there: then the outermost folder is the container's own.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        places = [mounts / controller, mounts / controllers] if controllers else [mounts, mounts / "unified"]
        inner = Path(path.lstrip("/"))
        for place in places:
            yield from (folder for part in (inner, *inner.parents) if (folder := place / part).is_dir())


def _cpu_quota(group: Path) -> float | None:
    """Cores' worth of time: `cpu.max` of version 2 is `QUOTA PERIOD`, or `max PERIOD`."""
    words = " ".join(_lines(group / "cpu.max")).split()
    if not words:
        words = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _memory_left(group: Path) -> int | None:
    """Bytes until the group's limit. What it holds of files that nobody uses is given up when memory is wanted."""
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = (next(iter(_lines(group / name)), "max") for name in (limit, usage))
        if "max" in (most, used) or int(most) >= _UNLIMITED:
            continue
        return max(0, int(most) - int(used) + (_field(group / "memory.stat", inactive) or 0))
    return None


def _field(path: Path, name: str) -> int | None:
    """The number behind a name in a file of lines `name number ...`."""
    return next((int(words[1]) for line in _lines(path) if (words := line.split())[:1] == [name]), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def resident_bytes(root: Path = Path("/")) -> int:
    """Memory that this process takes now; 0 where nobody says (not on Linux)."""
    return (_field(root / "proc/self/status", "VmRSS:") or 0) * 2**10
