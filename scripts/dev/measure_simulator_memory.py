"""Memory of one simulator process over many resets, in MiB, while its simulator is open.

    .venv/bin/python scripts/dev/measure_simulator_memory.py --resets 200 --steps 20 --tasks_every 20 --render

builds another task's environment every so many resets, as an evaluation does, and prints, along the way, the resident
set size before that environment is closed and the largest one that the process has had so far. Both should stay where
they are once every task was built once.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import get_suite, load_task

_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def resident_mib() -> float:
    """Resident set size of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_MIB


def peak_mib() -> float:
    """The largest resident set size that this process has had (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**10


def measure(
    suite: str, resets: int, steps: int, tasks_every: int, resolution: int | None
) -> dict[int, dict[str, float]]:
    """Resets done -> resident MiB `in_use` and at the `peak`, every `tasks_every` resets; None draws nothing."""
    found: dict[int, dict[str, float]] = {}
    count = get_suite(suite).get_num_tasks()
    for number, first in enumerate(range(0, resets, tasks_every)):
        task = load_task(suite, number % count)
        last = min(first + tasks_every, resets)
        with LiberoEnvironment(task, resolution or 256, render=resolution is not None) as environment:
            for reset in range(first, last):
                environment.reset(reset % len(task.init_states), seed=reset)
                for step in range(steps):
                    if resolution is not None and step % 8 == 0:
                        environment.observe()
                    environment.step([0.1, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
            # While the renderer and its copies of meshes and textures are there: closing gives a gigabyte back.
            found[last] = {"in_use": round(resident_mib(), 1), "peak": round(peak_mib(), 1)}
    return found


def main(command: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", default="libero_goal", help="its tasks, in turn")
    parser.add_argument("--resets", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="after each reset and its ten settle steps")
    parser.add_argument("--tasks_every", type=int, default=20, help="resets before the next task is built")
    parser.add_argument("--render", action="store_true", help="draw both cameras every eight steps")
    parser.add_argument("--resolution", type=int, default=256)
    arguments = parser.parse_args(command)
    for name, least in (("resets", 1), ("steps", 0), ("tasks_every", 1), ("resolution", 1)):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name} {value}: expected at least {least}")
    resolution = arguments.resolution if arguments.render else None
    print(json.dumps(measure(arguments.suite, arguments.resets, arguments.steps, arguments.tasks_every, resolution)))


if __name__ == "__main__":
    main()
