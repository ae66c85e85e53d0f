"""How many simulators a machine gets, against tables worked out by hand and folders as systems show them."""

import os
from pathlib import Path

import pytest

from experiments.robot.libero.rollouts.machine import default_workers
from prismatic.machine import Machine, read_machine

GIB = 2**30


@pytest.mark.parametrize(
    ("cores", "quota", "gib", "neighbours", "workers"),
    [
        (8, None, None, 1, 8),
        (8, None, 64, 1, 8),
        (8, 2.0, 64, 1, 2),
        (8, 2.9, 64, 1, 2),
        (8, 0.5, 64, 1, 1),
        (4, 16.0, 64, 1, 4),
        (64, None, 16, 1, 5),  # one GiB for the policy, 2.6 for each
        (64, None, 6.1, 1, 1),
        (64, None, 6.3, 1, 2),
        (64, None, 0.5, 1, 1),
        (64, None, 256, 8, 8),
        (64, None, 64, 8, 2),
        (4, None, 64, 8, 1),
        (64, 12.0, 20, 2, 3),
    ],
)
def test_workers_by_cores_and_memory(
    cores: int, quota: float | None, gib: float | None, neighbours: int, workers: int
) -> None:
    memory = None if gib is None else int(gib * GIB)
    assert default_workers(Machine(cores, quota, memory), neighbours) == workers


def files(root: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


MEMINFO = {"proc/meminfo": "MemTotal:       67108864 kB\nMemFree:         1000 kB\nMemAvailable:   33554432 kB"}
GROUPS = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("content", "quota", "memory"),
    [
        ({}, None, None),
        (MEMINFO, None, 32 * GIB),
        (  # version 2, without limits
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/user.slice",
                f"{GROUPS}/user.slice/cpu.max": "max 100000",
                f"{GROUPS}/user.slice/memory.max": "max",
                f"{GROUPS}/user.slice/memory.current": "5",
            },
            None,
            32 * GIB,
        ),
        (  # version 2, in a container: its group is the outermost one
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/",
                f"{GROUPS}/cpu.max": "250000 100000",
                f"{GROUPS}/memory.max": str(8 * GIB),
                f"{GROUPS}/memory.current": str(6 * GIB),
                f"{GROUPS}/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
            },
            2.5,
            3 * GIB,
        ),
        (  # version 2, the limits of a scheduler's job around this process's own group
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/slurm/job_7/step_0",
                f"{GROUPS}/slurm/job_7/cpu.max": "400000 100000",
                f"{GROUPS}/slurm/job_7/memory.max": str(20 * GIB),
                f"{GROUPS}/slurm/job_7/memory.current": str(4 * GIB),
                f"{GROUPS}/slurm/job_7/step_0/cpu.max": "max 100000",
                f"{GROUPS}/slurm/job_7/step_0/memory.max": "max",
            },
            4.0,
            16 * GIB,
        ),
        (  # version 1, in a container that sees the host's path
            {
                **MEMINFO,
                "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/",
                f"{GROUPS}/cpu,cpuacct/cpu.cfs_quota_us": "150000",
                f"{GROUPS}/cpu,cpuacct/cpu.cfs_period_us": "100000",
                f"{GROUPS}/memory/memory.limit_in_bytes": str(4 * GIB),
                f"{GROUPS}/memory/memory.usage_in_bytes": str(3 * GIB),
                f"{GROUPS}/memory/memory.stat": f"cache 9\ntotal_inactive_file {GIB}",
            },
            1.5,
            2 * GIB,
        ),
        (  # version 1, without limits
            {
                **MEMINFO,
                "proc/self/cgroup": "5:memory:/\n4:cpu:/",
                f"{GROUPS}/cpu/cpu.cfs_quota_us": "-1",
                f"{GROUPS}/cpu/cpu.cfs_period_us": "100000",
                f"{GROUPS}/memory/memory.limit_in_bytes": "9223372036854771712",
                f"{GROUPS}/memory/memory.usage_in_bytes": str(3 * GIB),
            },
            None,
            32 * GIB,
        ),
    ],
    ids=["nothing", "no groups", "v2 free", "v2 container", "v2 job", "v1 container", "v1 free"],
)
def test_limits_are_read_as_systems_show_them(
    tmp_path: Path, content: dict[str, str], quota: float | None, memory: int | None
) -> None:
    files(tmp_path, content)
    assert read_machine(tmp_path) == Machine(len(os.sched_getaffinity(0)), quota, memory)


def test_this_machine_has_cores_and_memory() -> None:
    machine = read_machine()
    assert machine.cores >= 1 and machine.memory_bytes is not None and machine.memory_bytes > 0
    assert default_workers(machine) <= machine.cores
