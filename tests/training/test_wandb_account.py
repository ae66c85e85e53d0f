"""Whether runs can be logged, told before they begin: real settings of wandb, made-up homes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.robot.libero.evaluation.checks import check_flags as check_evaluation
from experiments.robot.libero.settings.flags import EvaluationConfig
from prismatic.training.config import FinetuneConfig
from prismatic.training.preflight import check_flags as check_training

pytest.importorskip("wandb")

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789" * 4
CHECK = """
from prismatic.training.wandb_account import check_wandb
try:
    check_wandb()
    print("passes")
except ValueError as error:
    print(error)
"""


def checked(home: Path, **variables: str) -> str:
    """What the check says, with no login but what the arguments give; wandb reads its settings once per process."""
    left = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC", "RANK"))}
    left |= {"HOME": str(home), "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=left, cwd=home, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.splitlines()
    return said


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "--use_wandb True: nobody is logged in to Weights & Biases here; run `wandb login`"),
        ({"WANDB_API_KEY": KEY}, "passes"),
        ({"WANDB_API_KEY": "abc"}, "the API key in WANDB_API_KEY has 3 characters; expected at least 40"),
        ({"WANDB_MODE": "offline"}, "passes"),
        ({"WANDB_MODE": "disabled"}, "passes"),
        ({"WANDB_MODE": "on"}, "WANDB_MODE='on' is unknown; unset it, or choose of online, offline"),
        ({"RANK": "1"}, "passes"),  # another process logs
    ],
)
def test_a_missing_login_is_said_before_anything_is_loaded(
    tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    assert words in checked(tmp_path, **variables)


def test_a_login_of_wandb_itself_is_found(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert checked(tmp_path) == "passes"
    said = checked(tmp_path, WANDB_BASE_URL="https://wandb.example.org")
    assert "nobody is logged in" in said, "the login is for another server"


def test_training_and_evaluation_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "on")
    for check in (
        lambda: check_training(FinetuneConfig(use_wandb=True)),
        lambda: check_evaluation(EvaluationConfig(pretrained_checkpoint="x", use_wandb=True)),
    ):
        with pytest.raises(ValueError, match="--use_wandb True: WANDB_MODE='on' is unknown"):
            check()
