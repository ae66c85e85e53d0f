"""The demo's commands are ones that the project's command lines understand, and stages are skipped when done."""

import contextlib
import dataclasses
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
from lightvla.demo.checks import _EXPECTED
from lightvla.demo.checks import check_flags as check_demo
from lightvla.demo.settings import DemoConfig, Paths, evaluations, stage_commands
from lightvla.demo.small_model import SmallModelConfig
from lightvla.flags import FinetuneFlags
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.training.data import dataset_specs
from prismatic.training.preflight import check_flags as check_training
from prismatic.vla.gripper import GRIPPERS

ROOT = Path(__file__).resolve().parents[3]
PARSERS = {
    "collect": CollectionConfig,
    "build-small-model": SmallModelConfig,
    "finetune": FinetuneFlags,
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
    unpruned, pruned, baseline = parsed(config, "finetune")
    runs = parsed(config, "evaluate")
    assert unpruned.vla_path == str(model.output_dir) and pruned.vla_path == str(unpruned.run_dir)
    # Alike but for the pruner and what it is watched by.
    own = {"pruner", "noise_end_fraction", "picture_freq", "run_id_override"}
    differ = {f.name for f in dataclasses.fields(pruned) if getattr(pruned, f.name) != getattr(baseline, f.name)}
    assert differ == own and baseline.pruner == "none" and baseline.run_dir != unpruned.run_dir
    assert unpruned.data_root_dir == collection.output_dir and unpruned.dataset_name == collection.dataset_name
    for training in (unpruned, pruned, baseline):
        assert [spec.map_actions for spec, _ in dataset_specs(training)] == [GRIPPERS["libero"]]
    assert PrunerSpec.parse(unpruned.pruner).name == "none" and PrunerSpec.parse(pruned.pruner).name == "lightvla"
    for evaluation, run in zip(evaluations(config), runs, strict=True):
        check_flags(run)
        wanted = baseline if evaluation.name == "baseline" else pruned
        assert Path(run.pretrained_checkpoint) == wanted.run_dir
        assert (run.env_img_res, run.renderer) == (collection.resolution, collection.renderer)
        assert Path(run.output_dir) == Paths(config.output_dir).evaluation(evaluation.name)
    assert collection.canonical_quaternion == model.canonical_quaternion
    first, last = map(int, config.held_out_states.split("-"))
    assert first > int(config.train_states.split("-")[1]) and last - first + 1 == 12
    without = DemoConfig(output_dir=config.output_dir, baseline=False)
    assert parsed(without, "finetune") == [unpruned, pruned]
    assert "baseline" not in {evaluation.name for evaluation in evaluations(without)}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"stage": "train"}, "--stage train: expected one of all, collect, build, finetune, evaluate, report"),
        ({"held_out_states": "41-30"}, "--held_out_states '41-30': expected numbers and ranges such as"),
        ({"held_out_states": "all"}, "--held_out_states 'all': expected numbers and ranges"),
        ({"held_out_states": "30-60"}, "--held_out_states 30-60: LIBERO's tasks have initial states 0 to 49"),
        ({"held_out_states": "25-41"}, "--held_out_states 25-41 and --train_states 0-29 share state 25"),
        ({"train_states": "0-99"}, "--train_states 0-99: LIBERO's tasks have initial states 0 to 49"),
        ({"num_demos_per_task": "62,62"}, "--num_demos_per_task 62,62: expected a number from 1 on, or three of them"),
        ({"num_demos_per_task": "0"}, "--num_demos_per_task 0: expected"),
        ({"num_processes": 0}, "--num_processes 0: expected 1 or more"),
        ({"wide_starts_m": 0.0}, "--wide_starts_m 0.0: expected more than 0, up to 0.3"),
        ({"wide_starts_train_m": float("nan")}, "--wide_starts_train_m nan: expected 0 "),
        ({"wide_starts_share": 1.5}, "--wide_starts_share 1.5: expected 0 to 1"),
        ({"resolution": 8}, "--resolution 8: expected 16 to 4096"),
        ({"unpruned_steps": 0}, "--unpruned_steps 0: expected 1 or more"),
        ({"max_steps": -1}, "--max_steps -1: expected 1 or more"),
        ({"batch_size": 0}, "--batch_size 0: expected 1 or more"),
        ({"seed": -1}, "--seed -1: expected 0 to"),
        ({"starts_seed": 2**31}, "--starts_seed 2147483648: expected 0 to 2147483647"),
        ({"suffix": "/x"}, "--suffix /x: expected letters, digits"),
        ({"output_dir": Path("pyproject.toml/demo")}, "--output_dir pyproject.toml/demo: no folder that can be"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_made(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert demo.command(DemoConfig(**{"output_dir": tmp_path / "demo", **flags})) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and said in error and "\n" not in error
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("states", ["30", "30,35", "30,33-40"])
def test_any_list_of_held_out_states_is_evaluated(states):
    config = DemoConfig(held_out_states=states, wide_starts_m=0.3, wide_starts_train_m=0.0, suffix="-8")
    check_demo(config)
    for run in parsed(config, "evaluate"):
        check_flags(run)
        assert run.initial_states == states
    [collection] = parsed(config, "collect")
    collection.validate()
    for training in parsed(config, "finetune"):
        check_training(training)


def test_every_flag_of_the_demo_is_checked():
    others = {"train_states", "held_out_states", "output_dir", "baseline"}
    assert set(_EXPECTED) | others == {field.name for field in dataclasses.fields(DemoConfig)}


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
    other_seed = Paths(tmp_path, "-8").stage("finetune")
    other_seed.parent.mkdir()
    other_seed.write_text("{}")
    with pytest.raises(SystemExit, match="lightvla collect"):
        demo.run_stage(config, "collect", force=False)
    assert not json.loads(Paths(tmp_path).stage("collect").read_text())["done"]
    assert not other_seed.exists(), "it was trained on other demonstrations"


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
