"""The benchmark of `Policy.act`: what it measures, and the whole of it."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from scripts.dev.benchmark_policy import ROOT, BenchmarkConfig, measure, show

STAGES = {"preprocessing", "vision", "pruner", "llm", "total", "resident_mib"}


def test_every_call_is_measured_and_shown(small_policy_directory):
    times = measure(BenchmarkConfig(checkpoint=small_policy_directory, camera_size=64, measure_only=3))
    assert len(times) == 3 and all(set(timing) == STAGES for timing in times)
    console = Console(record=True, width=120)
    times[1]["total"] = 7000.0
    show({"one thread": times}, console)
    row = next(line for line in console.export_text().splitlines() if "one thread" in line)
    assert " 3 " in row and "7000000.0" in row, "the worst call is shown"


@pytest.mark.slow
def test_the_whole_command(small_policy_directory, tmp_path):
    output = tmp_path / "times.json"
    flags = ["--checkpoint", str(small_policy_directory), "--calls", "2", "--rounds", "1", "--output", str(output)]
    subprocess.run([sys.executable, str(ROOT / "scripts" / "dev" / "benchmark_policy.py"), *flags], check=True)
    assert {way: len(times) for way, times in json.loads(output.read_text()).items()} == {
        "defaults": 2, "OMP_WAIT_POLICY=PASSIVE": 2, "one thread": 2,
    }  # fmt: skip
