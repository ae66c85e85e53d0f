"""Every task of every suite is built, started from its first initial state, and stepped; a process per suite."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from experiments.robot.libero.settings.suite_names import STEP_CAPS, SUITES
from experiments.robot.libero.simulator.backend import choose_backend

ROOT = Path(__file__).parents[3]
PROCESSES = 2
STEPS = 10

# After the settle steps and a few more, objects should lie still; `fastest` (m/s or rad/s) tells where one falls or
# rolls, which is printed only: a few published starts do so. Only the first task is drawn: one renderer per process.
_EVERY_TASK = """
import json, sys, time
import numpy as np
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import get_suite, load_task
suite, steps = sys.argv[1], int(sys.argv[2])
for index in range(get_suite(suite).get_num_tasks()):
    began = time.perf_counter()
    row = {"suite": suite, "index": index, "error": None}
    try:
        task = load_task(suite, index)
        row |= {"name": task.name, "language": task.language, "states": len(task.init_states)}
        with LiberoEnvironment(task, 64, render=index == 0) as environment:
            environment.reset(0)
            row["solved_at_start"] = environment.succeeded()
            if index == 0:
                row["spread"] = int(np.ptp(environment.frame()))
            for _ in range(steps):
                environment.step([0, 0, 0.1, 0, 0, 0, -1])
            inner = environment.inner
            speeds = [np.abs(environment.data.cvel[inner.obj_body_id[name]]).max() for name in inner.objects_dict]
            row["fastest"] = float(np.max(speeds))
            row["finite"] = bool(np.isfinite(environment.data.qpos).all())
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = round(time.perf_counter() - began, 2)
    print(json.dumps(row), flush=True)
"""


def run_suite(suite: str) -> list[dict[str, Any]]:
    variables = {**os.environ, "MUJOCO_GL": choose_backend(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _EVERY_TASK, suite, str(STEPS)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode != 0:
        rows.append({"suite": suite, "index": len(rows), "error": result.stderr[-500:]})
    return rows


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_task_of_every_suite_starts() -> None:
    with ThreadPoolExecutor(PROCESSES) as pool:
        rows = [row for found in pool.map(run_suite, SUITES) for row in found]
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    print(f"{len(rows)} tasks, {seconds / len(rows):.2f} s each")
    for row in rows:
        if row["error"] or not row["finite"] or row["solved_at_start"] or row["fastest"] > 0.1:
            print({key: row.get(key) for key in ("suite", "index", "error", "solved_at_start", "fastest")})
    assert [row for row in rows if row["error"] is not None] == []
    assert len(rows) == 130 + (len(SUITES) - len(STEP_CAPS)) * 10
    assert all(row["finite"] and row["states"] == 50 and not row["solved_at_start"] for row in rows)
    assert all(row["spread"] > 100 for row in rows if row["index"] == 0)
