"""A simulator process does not grow with the number of resets and of tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.robot.libero.simulator.backend import choose_backend
from scripts.dev.measure_simulator_memory import main, measure, resident_mib

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
    command = [sys.executable, str(ROOT / "scripts" / "dev" / "measure_simulator_memory.py"), *flags]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    measured = {int(resets): mib for resets, mib in json.loads(result.stdout).items()}
    resident = {resets: mib["in_use"] for resets, mib in measured.items()}
    print(resident)
    assert list(resident) == list(range(20, 201, 20))
    assert all(mib["peak"] >= mib["in_use"] for mib in measured.values())
    # The first tasks fill caches; a leak of one model or one renderer per task would be hundreds of MiB after that.
    assert resident[200] - resident[100] < 100, resident


def test_what_is_measured_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    """An open simulator takes more than the interpreter with its packages; reading after closing would not tell."""
    before = resident_mib()
    found = measure("libero_goal", resets=1, steps=1, tasks_every=1, resolution=256)
    assert list(found) == [1] and found[1]["peak"] >= found[1]["in_use"] > before + 200
    assert found[1]["in_use"] > resident_mib() + 100, "closing gives memory back"
