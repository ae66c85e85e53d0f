"""The folder that would be uploaded, and its model card. Nothing is uploaded."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import draccus
import pytest
import torch
from huggingface_hub import ModelCard

from experiments.robot.libero.reports.model_card import evaluation_command
from experiments.robot.libero.results.results import EpisodeRecord, Results
from experiments.robot.libero.settings.flags import EvaluationConfig
from lightvla.commands.push import LINKED_FROM_BYTES, _place, main
from prismatic.checkpoints.directory import load_checkpoint
from prismatic.command_status import UNUSABLE
from prismatic.significance import wilson_interval

REPO = "someone/policy"


def results(folder: Path, checkpoint: Path = Path("elsewhere"), **config: object) -> Path:
    flags = asdict(EvaluationConfig(pretrained_checkpoint="runs/x", task_suite_name="libero_goal", **config))
    episodes = [
        EpisodeRecord("libero_goal", task, f"put_it_on_{task}", "put it", trial, trial, 7, success=trial < solved)
        for task, solved in ((1, 3), (4, 4))
        for trial in range(4)
    ]
    episodes.append(EpisodeRecord("libero_goal", 4, "put_it_on_4", "put it", 4, 4, 7, invalid="Traceback: boom"))
    run = {"git_commit": "0123abc", "renderer": "robosuite", "rendering_backend": "egl", "complete": True}
    policy = {
        "checkpoint": str(checkpoint),
        "pruner": "lightvla:multiplicity=weighted",
        "assumptions": [],
        "robot": {"open_loop_steps": 8},
    }
    Results(run, flags, policy, {"mujoco": "3.2.3", "torch": "2.11"}, episodes).save(folder / "results.json")
    return folder / "results.json"


@pytest.fixture
def checkpoint(small_policy_directory: Path, tmp_path: Path) -> Path:
    """As a run leaves it: with a training state and logs."""
    folder = Path(shutil.copytree(small_policy_directory, tmp_path / "run"))
    (folder / "training_state").mkdir()
    torch.save({"step": 3}, folder / "training_state" / "state.pt")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "lora_adapter").mkdir()
    return folder


def test_a_dry_run_writes_a_checkpoint_that_loads(small_policy_directory: Path, checkpoint: Path, tmp_path, caplog):
    shutil.rmtree(checkpoint / "lora_adapter")
    upload = tmp_path / "upload"
    file = results(tmp_path, checkpoint, num_open_loop_steps=4, initial_states="30-33")
    assert main([str(checkpoint), REPO, "--results", str(file), "--dry_run", str(upload)]) == 0
    assert "is it the same model" not in caplog.text
    published = {path.name for path in small_policy_directory.iterdir()} - {"small_model.json", "manifest.json"}
    assert {path.name for path in upload.iterdir()} == published | {"README.md"}
    for name in published:
        assert (upload / name).read_bytes() == (small_policy_directory / name).read_bytes()
    assert load_checkpoint(upload).action_head is not None
    assert (checkpoint / "training_state" / "state.pt").is_file() and (checkpoint / "metrics.jsonl").is_file()


def test_the_card_tells_results_protocol_and_command(checkpoint: Path, tmp_path: Path, caplog):
    shutil.rmtree(checkpoint / "lora_adapter")
    files = []
    for name, config in {"a": {"num_open_loop_steps": 4}, "b": {"control": "blank_images"}}.items():
        (tmp_path / name).mkdir()
        files.append(str(results(tmp_path / name, **config)))
    upload = tmp_path / "upload"
    assert main([str(checkpoint), REPO, "--results", *files, "--dry_run", str(upload), "--license", "llama2"]) == 0
    assert "is of checkpoint elsewhere, not" in caplog.text
    card = ModelCard.load(upload / "README.md")
    assert card.data.license == "llama2" and card.data.pipeline_tag == "robotics"
    [rate] = card.data.eval_results
    assert rate.metric_value == 87.5, "a control's rate is not the policy's"
    low, high = wilson_interval(7, 8)
    assert f"| **all** | 7 of 8 | 87.5% | {low:.1%} to {high:.1%} | 1 |" in card.text
    low, high = wilson_interval(3, 4)
    assert f"| put it on 1 | 3 of 4 | 75.0% | {low:.1%} to {high:.1%} | 0 |" in card.text
    assert "### libero_goal\n" in card.text and "### libero_goal, control blank_images" in card.text
    for fact in ("mujoco 3.2.3", "`0123abc`", "4 actions of each chunk", "LightVLA, L1 head", "llama2"):
        assert fact in card.text
    assert str(tmp_path) not in card.text, "no paths of this machine"


def test_the_command_repeats_the_evaluation(tmp_path: Path):
    given = {"num_open_loop_steps": 4, "wide_starts_m": 0.06, "task_ids": "1,4", "control": "random_tokens"}
    command = evaluation_command(Results.load(results(tmp_path, **given)), REPO).split()
    assert command[:2] == ["lightvla", "eval"]
    parsed = draccus.parse(EvaluationConfig, args=command[2:])
    assert parsed == EvaluationConfig(pretrained_checkpoint=REPO, task_suite_name="libero_goal", **given)
    # Each of the named states once: the number that stands in the results was given by nobody.
    named = Results.load(results(tmp_path, initial_states="30-41", num_trials_per_task=50))
    assert "--initial_states 30-41" in (command := evaluation_command(named, REPO)) and "num_trials" not in command
    named.run["protocol"] = {"num_trials_per_task": 24}
    named.config["num_trials_per_task"] = 24
    assert "--num_trials_per_task 24" in evaluation_command(named, REPO)


def test_what_cannot_be_uploaded_is_said(checkpoint: Path, tmp_path: Path, capsys):
    dry = ["--dry_run", str(tmp_path / "upload")]

    def refusal(*arguments: str) -> str:
        assert main(arguments) == UNUSABLE
        return capsys.readouterr().err

    assert "lora_adapter/ is incomplete" in refusal(str(checkpoint), REPO, *dry)
    assert "give user/name" in refusal(str(checkpoint), "name", *dry)
    assert "there is no folder" in refusal(str(tmp_path / "nowhere"), REPO, *dry)
    shutil.rmtree(checkpoint / "lora_adapter")
    assert "no results at" in refusal(str(checkpoint), REPO, *dry, "--results", str(tmp_path))
    assert not (tmp_path / "upload").exists()
    assert "is not empty" in refusal(str(checkpoint), REPO, "--dry_run", str(checkpoint))


def test_no_code_is_named_that_is_not_uploaded(checkpoint: Path, tmp_path: Path):
    shutil.rmtree(checkpoint / "lora_adapter")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "configuration_prismatic.A"}}))
    upload = tmp_path / "upload"
    assert main([str(checkpoint), REPO, "--dry_run", str(upload)]) == 0
    assert not [file.name for file in upload.glob("*.json") if "auto_map" in file.read_text()]
    assert load_checkpoint(upload).action_head is not None


def test_large_files_are_linked(tmp_path: Path):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"0" * LINKED_FROM_BYTES)
    small.write_bytes(b"0")
    for file in (large, small):
        _place(file, tmp_path / f"{file.name}-placed")
    assert (tmp_path / "large-placed").samefile(large) and not (tmp_path / "small-placed").samefile(small)


def test_the_command_starts_without_a_search_path(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(__file__).resolve().parents[3] / "scripts" / "push_to_hub.py"
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and b"--dry_run" in done.stdout, done
