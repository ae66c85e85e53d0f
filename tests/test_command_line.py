"""What a person mistypes is named, with what was probably meant."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from prismatic.command_line import FlagError, parse_flags

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    task_suite_name: str = "libero_goal"
    num_envs: int | None = None
    resume: bool = False
    offset: float = 0.0


def test_flags_become_fields(tmp_path: Path) -> None:
    assert parse_flags(Config, []) == Config()
    words = ["--num_envs", "3", "--resume", "True", "--offset", "-0.5", "--task_suite_name=libero_10"]
    assert parse_flags(Config, words) == Config("libero_10", 3, True, -0.5)
    (tmp_path / "flags.yaml").write_text("num_envs: 5\n")
    assert parse_flags(Config, ["--config_path", str(tmp_path / "flags.yaml"), "--resume", "True"]) == Config(
        num_envs=5, resume=True
    )


@dataclass
class Places:
    output_dir: Path = Path("runs")
    checkpoint: str = "openvla/openvla-7b"
    note: str = "~"


def test_the_home_folder_is_found_where_no_shell_has_done_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_flags(Places, ["--output_dir=~/runs", "--checkpoint=~/x--5_chkpt", "--note=~5 cm"]) == Places(
        Path("/home/someone/runs"), "/home/someone/x--5_chkpt", "~5 cm"
    )
    assert parse_flags(Places, []) == Places()
    with pytest.raises(FlagError, match="home"):
        parse_flags(Places, ["--output_dir=~nobody-of-this-name/runs"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task_suite_nam", "libero_10"], r"unknown flag --task_suite_nam; did you mean --task_suite_name\?"),
        (["--colour=red"], r"unknown flag --colour \(--help lists all\)"),
        (["--num_envs", "two"], "num_envs.*two"),
        (["--resume", "maybe"], "resume.*maybe"),
        (["--resume"], "--resume has no value"),
        (["--resume", "--num_envs", "2"], "--resume has no value"),
        (["--config_path", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_read_is_named(words: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=f"(?s){message}"):
        parse_flags(Config, words)


def test_a_command_ends_with_one_line() -> None:
    command = [sys.executable, "scripts/build_small_model.py", "--image_siz", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --image_siz; did you mean --image_size? (--help lists all)\n"
