"""fp8 by torchao, which no GPU is needed to compute with, only to be quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCHAO = "torchao==0.18.0"


@pytest.fixture(scope="module")
def with_torchao(pytestconfig) -> dict[str, str]:
    """Environment variables under which torchao is found; it is in no extra, since peft imports it where it is."""
    folder = pytestconfig.cache.mkdir(TORCHAO)
    if not (folder / "torchao").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), TORCHAO]
        installed = subprocess.run(command, capture_output=True, text=True)
        if installed.returncode != 0:
            pytest.skip(f"pip cannot install {TORCHAO} here: {installed.stderr.strip().splitlines()[-1]}")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


@pytest.mark.slow  # downloads 3 MB; fp8 on a GPU itself is in scripts/dev/gpu_check.py
def test_rows_of_zeros_stay_zero_in_fp8_and_all_others_are_as_close_as_eight_bits_are(with_torchao):
    script = ROOT / "tests" / "models" / "fp8_on_a_cpu.py"
    done = subprocess.run([sys.executable, str(script)], env=with_torchao, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["weights"] == "Float8Tensor"
    errors = np.array(found["errors"])
    assert errors[2] == 0
    others = np.delete(errors, 2)
    assert (others > 0).all() and (others < 0.1).all()
