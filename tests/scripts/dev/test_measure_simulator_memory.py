"""A simulator process does not grow with the number of resets and of tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.robot.libero.simulator.backend import choose_backend
from scripts.dev.measure_simulator_memory import main

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("flags", [["--tasks_every", "0"], ["--resets", "0"], ["--steps", "-1"], ["--resolution", "0"]])
def test_impossible_numbers_are_refused_first(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert f"error: {' '.join(flags)}: expected at least" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("flags", [[], ["--render"]], ids=["blind", "rendering"])
def test_memory_stays_flat_over_200_resets(flags: list[str]) -> None:
    variables = {**os.environ, "MUJOCO_GL": choose_backend(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "measure_simulator_memory.py"), *flags]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    resident = {int(resets): mib for resets, mib in json.loads(result.stdout).items()}
    print(resident)
    assert list(resident) == list(range(20, 201, 20))
    # The first tasks fill caches; a leak of one model or one renderer per task would be hundreds of MiB after that.
    assert resident[200] - resident[100] < 100, resident
