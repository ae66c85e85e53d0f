"""How far two of MuJoCo's off-screen backends draw the same LIBERO frames differently.

A process keeps the backend that it began with, so each draws in a process of its own:

    .venv/bin/python scripts/dev/compare_renderers.py --backends egl,osmesa

OSMesa needs the Debian package `libosmesa6`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prismatic.command_status import UNUSABLE, print_error

ROOT = Path(__file__).resolve().parents[2]
TASKS = (("libero_spatial", 0), ("libero_object", 3), ("libero_goal", 7), ("libero_10", 2))
"""Suite and task index: a table, a floor, a table with a stove, and a kitchen."""
STEPS = 15

"""Exit status where a backend cannot draw."""

Frames = dict[str, NDArray[np.uint8]]


def draw(out: Path, resolution: int) -> None:
    """Draw both cameras of every task after a reset and after some equal actions, with this process's `MUJOCO_GL`."""
    from experiments.robot.libero.simulator.environment import CAMERAS, LiberoEnvironment
    from experiments.robot.libero.simulator.tasks import load_task

    frames: Frames = {}
    for suite, index in TASKS:
        with LiberoEnvironment(load_task(suite, index), resolution, seed=7) as environment:
            environment.reset(0)
            rng = np.random.default_rng(0)
            for when in ("reset", f"{STEPS} steps"):
                frames |= {f"{suite} task {index}, {key}, {when}": environment.frame(key) for key in CAMERAS}
                for _ in range(STEPS if when == "reset" else 0):
                    environment.step(np.append(rng.uniform(-0.5, 0.5, 6), -1.0))
    # The arrays' names hold spaces and commas, which file names inside the archive may.
    np.savez(out, **frames)  # type: ignore[arg-type]


def draw_with(backend: str, resolution: int) -> Frames:
    """The frames of another process that draws with `backend`; raises RuntimeError with its last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "frames.npz"
        command = [sys.executable, __file__, "--draw", str(out), "--resolution", str(resolution)]
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        variables = {**os.environ, "MUJOCO_GL": backend, "PYTHONPATH": paths}
        variables.pop("PYOPENGL_PLATFORM", None)  # MuJoCo's mark that this process draws with another backend
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
        if result.returncode != 0 or not out.is_file():
            reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
            raise RuntimeError(f"MUJOCO_GL={backend} cannot draw here: {reason}")
        with np.load(out) as arrays:
            return dict(arrays)


def compare(first: Frames, second: Frames) -> list[str]:
    """One line per frame, and one over all: mean and largest difference in grey levels, share of values that differ."""
    if set(first) != set(second):
        raise ValueError(f"the frames differ: {sorted(set(first) ^ set(second))}")
    pairs = {name: (first[name], second[name]) for name in first}
    pairs["all"] = (
        np.concatenate([frame.ravel() for frame, _ in pairs.values()]),
        np.concatenate([frame.ravel() for _, frame in pairs.values()]),
    )
    return [f"{name}: {describe(*pair)}" for name, pair in pairs.items()]


def describe(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> str:
    difference = np.abs(first.astype(int) - second.astype(int))
    if not difference.any():
        return "equal"
    share = (difference > 0).mean()
    return f"mean {difference.mean():.2g}, largest {difference.max()} of 255, {share:.2%} of values differ"


def main(command: Sequence[str] | None = None) -> int:
    """Draw with both backends and compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backends", default="egl,osmesa", help="two values of MUJOCO_GL")
    parser.add_argument("--resolution", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--draw", type=Path, help="draw with this process's MUJOCO_GL into a file, and no more")
    arguments = parser.parse_args(command)
    if arguments.draw is not None:
        draw(arguments.draw, arguments.resolution)
        return 0
    backends = arguments.backends.split(",")
    if len(backends) != 2:
        parser.error(f"--backends {arguments.backends}: expected two, such as egl,osmesa")
    try:
        first, second = (draw_with(backend, arguments.resolution) for backend in backends)
    except RuntimeError as error:
        print_error(error)
        return UNUSABLE
    print("\n".join(compare(first, second)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
