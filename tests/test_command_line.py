"""What a person mistypes is named, with what was probably meant."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from experiments.robot.libero.settings.flags import EvaluationConfig
from prismatic.command_line import PUBLISHED_ELSEWHERE, FlagError, named_by_node, parse_flags, speaks_for_node
from prismatic.training.config import FinetuneConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    task_suite_name: str = "libero_goal"
    num_envs: int | None = None
    resume: bool = False
    offset: float = 0.0
    note: str | None = "x"


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
        (["--offset", "None"], "offset.*None"),
        (["--resume_steps", "3"], r"unknown flag --resume_steps \(--help lists all\)$"),
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


def test_none_is_no_word() -> None:
    assert parse_flags(Config, ["--num_envs", "None", "--note=None"]) == Config(note=None)
    assert parse_flags(Config, ["--task_suite_name", "None"]).task_suite_name == "None", "it may not be None"
    assert parse_flags(FinetuneConfig, ["--resume_step", "None"]).resume_step is None
    assert parse_flags(EvaluationConfig, ["--unnorm_key", "None", "--pruner", "none"]).unnorm_key is None


@pytest.mark.parametrize(
    ("flag", "config", "words"),
    [
        ("--save_steps", FinetuneConfig, "here it is --save_freq"),
        ("--adapter_tmp_dir", FinetuneConfig, "not needed"),
        ("--use_minivlm", FinetuneConfig, "models other than Llama's"),
        ("--use_pro_version", EvaluationConfig, "VLA-Adapter's heads"),
        ("--vlm_path", FinetuneConfig, "here it is --vla_path"),
        ("--vla.type", FinetuneConfig, "training recipes"),
        ("--num_diffusion_steps", EvaluationConfig, "--num_diffusion_steps_inference in evaluation"),
        ("--save_version", EvaluationConfig, "here it is --run_id_note"),
        ("--save_steps", EvaluationConfig, "here it is --save_freq, of another command"),
    ],
)
def test_flags_of_other_projects_are_translated(flag: str, config: type, words: str) -> None:
    with pytest.raises(FlagError, match=f"unknown flag {re.escape(flag)}: .*{re.escape(words)}") as error:
        parse_flags(config, [flag, "5"])
    assert "did you mean" not in str(error.value)


def test_what_is_said_to_stand_for_them_is_there() -> None:
    here = {field.name for config in (FinetuneConfig, EvaluationConfig) for field in fields(config)}
    assert not here & set(PUBLISHED_ELSEWHERE), "a flag of our own needs no translation"
    named = {name for sentence in PUBLISHED_ELSEWHERE.values() for name in re.findall(r"--(\w+)", sentence)}
    assert named <= here


def test_one_process_on_every_node_speaks_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert speaks_for_node() and named_by_node("no data") == "no data"
    said = {}
    for rank in range(4):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank % 2), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        said[rank] = speaks_for_node()
    assert said == {0: True, 1: False, 2: True, 3: False}
    assert named_by_node("no data") == f"on node {socket.gethostname()}: no data"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert named_by_node("no data") == "no data"


@pytest.mark.parametrize(
    "script",
    ["experiments/robot/libero/run_libero_eval.py", "vla-scripts/finetune.py", "scripts/collect_libero_demos.py"],
)
def test_a_clone_of_another_project_on_the_path_does_not_get_in_the_way(tmp_path: Path, script: str) -> None:
    """OpenVLA and its forks have packages `prismatic` and `experiments`, too."""
    for package in ("prismatic", "experiments"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('a package of another project')\n")
    command = [sys.executable, script, "--colour", "red"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "unknown flag --colour (--help lists all)" in done.stdout + done.stderr
