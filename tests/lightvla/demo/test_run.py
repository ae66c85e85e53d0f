"""The demo's commands are ones that the project's command lines understand, and stages are skipped when done."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import draccus
import pytest

from experiments.robot.libero.demonstrations.config import CollectionConfig
from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.settings.flags import EvaluationConfig
from lightvla.demo import run as demo
from lightvla.demo.settings import DemoConfig, Paths, evaluations, stage_commands
from lightvla.demo.small_model import SmallModelConfig
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import dataset_specs
from prismatic.vla.gripper import GRIPPERS

ROOT = Path(__file__).resolve().parents[3]
PARSERS = {
    "collect": CollectionConfig,
    "build-small-model": SmallModelConfig,
    "finetune": FinetuneConfig,
    "eval": EvaluationConfig,
}


def parsed(config: DemoConfig, stage: str) -> list:
    found = []
    for command in stage_commands(config, stage):
        place = command.index("lightvla") + 1
        found.append(draccus.parse(PARSERS[command[place]], args=command[place + 1 :]))
    return found


def test_every_command_is_understood_and_the_stages_fit_together():
    config = DemoConfig(output_dir=Path("a folder/demo"))
    [collection], [model] = parsed(config, "collect"), parsed(config, "build")
    unpruned, pruned = parsed(config, "finetune")
    runs = parsed(config, "evaluate")
    assert unpruned.vla_path == str(model.output_dir) and pruned.vla_path == str(unpruned.run_dir)
    assert unpruned.data_root_dir == collection.output_dir and unpruned.dataset_name == collection.dataset_name
    for training in (unpruned, pruned):
        assert [spec.map_actions for spec, _ in dataset_specs(training)] == [GRIPPERS["libero"]]
    assert PrunerSpec.parse(unpruned.pruner).name == "none" and PrunerSpec.parse(pruned.pruner).name == "lightvla"
    for evaluation, run in zip(evaluations(config), runs, strict=True):
        check_flags(run)
        assert Path(run.pretrained_checkpoint) == pruned.run_dir
        assert (run.env_img_res, run.renderer) == (collection.resolution, collection.renderer)
        assert Path(run.output_dir) == Paths(config.output_dir).evaluation(evaluation.name)
    assert collection.canonical_quaternion == model.canonical_quaternion
    first, last = map(int, config.held_out_states.split("-"))
    assert first > int(config.train_states.split("-")[1]) and last - first + 1 == 12


def test_a_finished_stage_is_skipped_unless_its_command_changed(tmp_path):
    config = DemoConfig(output_dir=tmp_path, seed=3)
    record = Paths(tmp_path).stage("build")
    demo.run_stage(config, "build", force=False)
    made = (Paths(tmp_path).base / "model.safetensors").stat().st_mtime_ns
    assert json.loads(record.read_text())["commands"] == stage_commands(config, "build")
    demo.run_stage(config, "build", force=False)
    assert (Paths(tmp_path).base / "model.safetensors").stat().st_mtime_ns == made
    demo.run_stage(DemoConfig(output_dir=tmp_path, seed=4), "build", force=False)
    assert (Paths(tmp_path).base / "model.safetensors").stat().st_mtime_ns != made


def test_a_failing_command_ends_the_demo_and_is_named(tmp_path):
    config = DemoConfig(output_dir=tmp_path, train_states="90-91")
    with pytest.raises(SystemExit, match="lightvla collect"):
        demo.run_stage(config, "collect", force=False)
    assert not json.loads(Paths(tmp_path).stage("collect").read_text())["done"]


@pytest.mark.slow
def test_a_changed_stage_undoes_what_was_made_from_it(tmp_path):
    paths = Paths(tmp_path)
    demo.run_stage(DemoConfig(output_dir=tmp_path, seed=3), "build", force=False)
    paths.stage("finetune").write_text("{}")
    demo.run_stage(DemoConfig(output_dir=tmp_path, seed=4), "build", force=False)
    assert not paths.stage("finetune").exists()


@pytest.mark.slow
def test_a_demo_that_is_told_to_stop_leaves_nothing_running(tmp_path):
    flags = ["--stage", "collect", "--output_dir", str(tmp_path), "--num_processes", "1"]
    process = subprocess.Popen([sys.executable, "scripts/demo.py", *flags], cwd=ROOT, start_new_session=True)
    try:
        while process.poll() is None and not any(map(simulates, group(process.pid))):
            time.sleep(0.2)
        process.terminate()
        assert process.wait(timeout=90) == demo.STOPPED
        # What only ends because those before it have (multiprocessing's resource tracker) may take a moment more.
        ended_by = time.monotonic() + 20
        while group(process.pid) and time.monotonic() < ended_by:
            time.sleep(0.1)
        assert group(process.pid) == []
    finally:
        for each in group(process.pid):
            os.kill(each, signal.SIGKILL)
    assert not json.loads(Paths(tmp_path).stage("collect").read_text())["done"]


def simulates(number: int) -> bool:
    """Whether a process is one that the collector has started for a simulator."""
    with contextlib.suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes()
    return False


def group(leader: int) -> list[int]:
    """The processes of a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            found += [int(folder.name)] if os.getpgid(int(folder.name)) == leader else []
    return found
