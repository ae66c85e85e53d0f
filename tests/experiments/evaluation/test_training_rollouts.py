"""Rollouts while a policy is trained: what is refused before, what is told of them, and what a resumed run drops."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_rlds import write_tiny_rlds

from experiments.robot.libero.evaluation.training_rollouts import TrainingRollouts, make_rollouts
from experiments.robot.libero.settings.training_flags import suite_of_dataset
from lightvla.flags import FinetuneFlags
from prismatic.training.config import FinetuneConfig
from prismatic.training.runs.identity import plain_flags

ROOT = Path(__file__).resolve().parents[3]


def test_the_flags_of_rollouts_are_no_part_of_the_run(tmp_path: Path):
    flags = FinetuneFlags(rollout_freq=5, rollout_tasks="1", run_root_dir=tmp_path, resume=True)
    config = flags.config()
    assert type(config) is FinetuneConfig and config.resume == "True"
    assert flags.run_dir != config.run_dir and "rollout_freq" not in plain_flags(config)
    assert config.run_dir == FinetuneConfig(run_root_dir=tmp_path).run_dir


@pytest.mark.parametrize(
    ("dataset", "suite"),
    [
        ("libero_goal_no_noops", "libero_goal"),
        ("libero_10_no_noops", "libero_10"),
        ("libero_goal_demo", "libero_goal"),
        ("libero_object_temp_x0.1_no_noops", "libero_object_temp_x0.1"),
        ("libero_100", None),
        ("bridge_orig", None),
    ],
)
def test_a_dataset_tells_its_suite(dataset: str, suite: str | None):
    assert suite_of_dataset(dataset) == suite


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rollout_freq": -1}, "--rollout_freq -1: expected 0 or more"),
        ({"rollout_suite": "libero_gaol"}, "unknown LIBERO suite 'libero_gaol'; known: "),
        ({"rollout_tasks": "1,12"}, "--rollout_tasks: libero_goal has no task 12; expected 0 to 9"),
        ({"rollout_tasks": "one"}, "--rollout_tasks 'one': expected numbers and ranges"),
        ({"rollout_states": "50"}, "--rollout_states: task 0 has no initial state 50; it has 50"),
        ({"rollout_renderer": "slow"}, "unknown --rollout_renderer 'slow'; known: "),
        ({"rollout_envs": 0}, "--rollout_envs 0: expected at least 1"),
        ({"dataset_name": "libero_mine"}, "--rollout_suite is missing: the name of dataset 'libero_mine' begins with"),
        ({"dataset_name": "bridge_orig"}, "dataset 'bridge_orig' is of robot 'bridge', which differs from LIBERO's in"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(given: dict[str, Any], words: str, tmp_path: Path):
    flags = FinetuneFlags(
        **{"dataset_name": "libero_goal_no_noops", "rollout_freq": 5, "run_root_dir": tmp_path} | given
    )
    with pytest.raises(ValueError) as error:
        make_rollouts(flags, flags.config(), rank=0, processes=1)
    assert words in str(error.value)


def test_rollouts_of_undone_steps_are_dropped(tmp_path: Path):
    flags = FinetuneFlags(rollout_freq=2, run_root_dir=tmp_path, run_id_override="run", max_steps=5)
    rollouts = TrainingRollouts(flags, flags.config(), simulates=False)
    assert [step for step in range(1, 6) if rollouts.is_due(step)] == [2, 4, 5]
    rollouts.rewind(0)
    assert not (tmp_path / "run").exists()
    for step in (2, 4):
        (tmp_path / "run" / "rollouts" / f"step_{step:08d}" / "videos").mkdir(parents=True)
    file = tmp_path / "run" / "rollouts.jsonl"
    file.write_text("".join(json.dumps({"step": step, "success": True}) + "\n" for step in (2, 2, 4)))
    rollouts.rewind(3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 2]
    assert [folder.name for folder in (tmp_path / "run" / "rollouts").iterdir()] == ["step_00000002"]


def told(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # beside much other work
def test_a_run_is_rolled_out_and_goes_on(untrained_checkpoint: Path, tmp_path: Path):
    dataset, run = "libero_spatial_no_noops", tmp_path / "run"
    write_tiny_rlds(tmp_path / "data", dataset, episodes=3, steps=12, size=64)

    def finetune(*more: str) -> str:
        flags = f"""--vla_path {untrained_checkpoint} --data_root_dir {tmp_path / "data"} --dataset_name {dataset}
            --run_root_dir {tmp_path} --run_id_override run --use_lora False --num_images_in_input 2 --use_proprio True
            --batch_size 2 --max_steps 4 --save_freq 2 --precision fp32 --device cpu --num_workers 0
            --rollout_tasks 1 --rollout_resolution 64 --rollout_renderer fast --rollout_envs 2"""
        command = [sys.executable, "-m", "lightvla", "finetune", *flags.split(), *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    log = finetune("--rollout_states", "0-1", "--rollout_freq", "4")
    lines = told(run, "rollouts.jsonl")
    assert [(line["step"], line["task"], line["initial_state"]) for line in lines] == [(4, 1, 0), (4, 1, 1)]
    assert all(line["success"] is False and line["steps"] == 220 for line in lines)
    assert (run / lines[0]["video"]).stat().st_size > 10_000 and lines[1]["video"] is None
    rates = [(line["step"], line["rollout_success_rate"]) for line in told(run, "metrics.jsonl") if "rollouts" in line]
    assert rates == [(4, 0.0)] and "rollouts: 0/2 solved" in log
    finetune("--rollout_states", "1", "--rollout_freq", "2", "--resume", "2")
    assert [(line["step"], line["initial_state"]) for line in told(run, "rollouts.jsonl")] == [(4, 1)]
    assert len(list((run / "rollouts" / "step_00000004" / "videos").glob("*.mp4"))) == 1, "the old video is gone"
