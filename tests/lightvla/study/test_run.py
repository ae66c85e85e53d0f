"""A tiny study in the real simulator: stopped twice, gone on with, and whole in the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from study_files import CONTENT, check_numbers, write_study

from lightvla.study.benchmarks import SceneBenchmark
from lightvla.study.definition import read_study
from lightvla.study.flags import study_parser
from lightvla.study.places import Places
from lightvla.study.progress import Progress
from lightvla.study.records import ArmResult
from lightvla.study.run import command
from lightvla.study.running import held
from prismatic.command_status import STOPPED, UNWANTED

ROOT = Path(__file__).resolve().parents[3]
SCENE = {
    **CONTENT["scenes"][0], "name": "stove", "tasks": [1], "held_out_states": "30", "trials_per_task": 2,
    "demonstrations_per_task": 2, "wide_starts_share": 0.0,
}  # fmt: skip
TINY = {
    **CONTENT,
    "scenes": [SCENE],
    "training": {**CONTENT["training"], "seeds": [7]},
    "arms": [
        *CONTENT["arms"][:3],
        {"name": "random", "kind": "untrained", "flags": "--pruner random:tokens={lightvla}"},
    ],
}


def started(folder: Path, *flags: str) -> subprocess.Popen:
    words = [folder.name, "--studies_dir", str(folder.parent), *flags]
    return subprocess.Popen([sys.executable, "scripts/study.py", *words], cwd=ROOT, start_new_session=True)


def stopped_when(folder: Path, moment: Callable[[], bool], how: signal.Signals) -> None:
    """Run it, stop it at the moment, and see that nothing goes on."""
    process = started(folder)
    try:
        deadline = time.monotonic() + 1200
        while process.poll() is None and not moment() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert process.poll() is None, "it ended before it could be stopped"
        process.send_signal(how)
        assert process.wait(timeout=180) == STOPPED
        ended_by = time.monotonic() + 30
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < ended_by:
                os.killpg(process.pid, 0)
                time.sleep(0.2)
            pytest.fail("something still runs")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def with_everything() -> dict:
    """The tiny study with a sampler, a control, a checkpoint and a perturbed scene."""
    none, lightvla, grid, random = TINY["arms"]
    sampler = {"name": "sampler", "kind": "trained", "flags": "--pruner grids:tokens={lightvla}"}
    added = {"name": "added", "kind": "control", "flags": "--control added_tokens"}
    arms = [sampler, none, {**lightvla, "checkpoints": [2]}, grid, random, added]
    beside = {"checkpoint_trials_per_task": 1, "perturbations": ["position"], "perturbed_arms": ["none"]}
    return {**TINY, "scenes": [{**SCENE, **beside}], "arms": arms}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_study_that_is_stopped_goes_on_and_ends_whole(tmp_path: Path) -> None:
    folder, content = tmp_path / "tiny", with_everything()
    places = write_study(folder, content)
    study = read_study(places.definition)

    def trains() -> bool:
        return (places.runs / "stove-none-seed7" / "run.json").is_file()

    def evaluates() -> bool:
        files = list(places.evaluation("evaluate-stove-none-seed7").glob("episodes.*.jsonl"))
        return any(len(file.read_text().splitlines()) >= 2 for file in files)  # a header, then rollouts

    stopped_when(folder, trains, signal.SIGTERM)
    collected = places.record("collect-stove")
    before = collected.read_bytes()
    assert json.loads(before)["done"] and places.plan.is_file()
    stopped_when(folder, evaluates, signal.SIGINT)
    process = started(folder)
    assert process.wait(timeout=1800) == 0
    assert collected.read_bytes() == before, "what was done is not done again"
    assert Progress(study, places).left(None) == []
    check_numbers(places)
    pruned = ArmResult.load(places.result(study, "stove", "lightvla", 7))
    count = max(1, round(pruned.tokens_kept))
    for arm in ("grid", "random"):
        result = ArmResult.load(places.result(study, "stove", arm, 7))
        assert {rollout.tokens for rollout in result.rollouts} == {float(count)} and not result.curves
        assert [rollout.key for rollout in result.rollouts] == [(1, 30, 0), (1, 30, 1)]
    assert set(pruned.curves) >= {"loss", "tokens_kept"} and not pruned.command.startswith("'")
    sampled = ArmResult.load(places.result(study, "stove", "sampler", 7))
    assert sampled.pruner == f"grids:tokens={count}"
    more = {
        rollout.key: rollout.tokens for rollout in ArmResult.load(places.result(study, "stove", "added", 7)).rollouts
    }
    assert all(more[rollout.key] > rollout.tokens for rollout in pruned.rollouts)
    halfway = ArmResult.load(places.result(study, "stove", "lightvla", 7, "step2"))
    assert [rollout.key for rollout in halfway.rollouts] == [(1, 30, 0)] and not halfway.curves
    assert "stove-lightvla-seed7--2_chkpt" in halfway.command and halfway.pruner == pruned.pruner
    moved = ArmResult.load(places.result(study, "stove", "none", 7, "position"))
    assert "--perturbation position" in moved.command and moved.tasks == pruned.tasks
    assert [rollout.key for rollout in moved.rollouts] == [(1, 30, 0), (1, 30, 1)]
    baseline = ArmResult.load(places.result(study, "stove", "none", 7))
    assert 0 < pruned.flops < baseline.flops and min(pruned.query_ms, baseline.query_ms) > 0
    assert pruned.training["seconds"] > 1 and pruned.training["host_peak_gb"] > 0.1
    assert all(rollout.jerk > 0 for rollout in pruned.rollouts)
    alone = SceneBenchmark.load(places.benchmark(study, "stove"))
    assert [row.pruner for row in alone.rows] == ["none", "lightvla", f"grid:tokens={count}", f"random:tokens={count}"]
    assert {row.tokens for row in alone.rows[1:]} == {(count, count)} and alone.rows[0].times_as_fast == (1, 1, 1)
    assert alone.rows[1].flops < alone.rows[0].flops and all(row.ms > 0 for row in alone.rows)
    assert "A query, by the benchmark" in (folder / "report.md").read_text()
    # A changed definition is refused, and a second process too.
    options = study_parser().parse_args([folder.name, "--studies_dir", str(tmp_path)])
    with held(places):
        assert command(options) == 2
    places.definition.write_text(yaml.safe_dump({**content, "question": "Another?"}))
    assert command(options) == 2


@pytest.mark.slow
def test_a_step_that_fails_is_named_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Collection cannot write where a file is in the way."""
    places = write_study(tmp_path / "s", TINY)
    places.work.mkdir()
    places.data.write_text("in the way")
    assert command(study_parser().parse_args(["s", "--studies_dir", str(tmp_path)])) == UNWANTED
    error = capsys.readouterr().err
    assert "collect-stove ended with status 2; its output is in" in error and "lightvla collect" in error
    assert str(places.data) in places.log("collect-stove").read_text()
    progress = Progress(read_study(places.definition), places)
    record = progress.record(progress.steps["collect-stove"])
    assert record is not None and not record.done and not places.plan.exists()


def test_the_plan_is_shown_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = write_study(tmp_path / "s", TINY)
    assert command(study_parser().parse_args(["s", "--studies_dir", str(tmp_path), "--list"])) == 0
    text = capsys.readouterr().out
    assert "train-stove-parent-seed7" in text and "left: 10 of 10 steps, about" in text
    assert ", 2 evaluations at a time, by the demo's times on two free cores" in text
    assert text.index(TINY["question"][:20]) < text.index("--pruner grid:tokens=") < text.index("collect-stove")
    assert not places.work.exists()
    assert command(study_parser().parse_args(["s", "--studies_dir", str(tmp_path), "--list", "--only", "none"])) == 0
    assert "left: 5 of 10 steps" in capsys.readouterr().out
    _finished(places, "build-seed7")
    assert command(study_parser().parse_args(["s", "--studies_dir", str(tmp_path), "--list", "True"])) == 0
    text = capsys.readouterr().out
    assert "left: 9 of 10 steps" in text and "by the demo's times on two free cores" in text, "no other is like it"
    _finished(places, "collect-stove")
    assert command(study_parser().parse_args(["s", "--studies_dir", str(tmp_path), "--list", "True"])) == 0
    text = capsys.readouterr().out
    assert "left: 8 of 10 steps" in text and "finished steps" not in text
    _finished(places, "train-stove-parent-seed7")
    assert (
        command(study_parser().parse_args(["s", "--studies_dir", str(tmp_path), "--list", "--num_processes", "1"])) == 0
    )
    said = ", one evaluation at a time, by this machine's finished steps, else by the demo's times on two free cores"
    assert said in capsys.readouterr().out


def _finished(places: Places, name: str) -> None:
    """A step that is done, as far as the next ones can see."""
    progress = Progress(read_study(places.definition), places)
    step = progress.steps[name]
    progress.begin(step)
    step.proof.mkdir(parents=True)
    progress.end(step, 3.0, done=True)


def test_only_one_process_runs_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = write_study(tmp_path / "s", TINY)
    with held(Places(places.root)):
        assert command(study_parser().parse_args(["s", "--studies_dir", str(tmp_path)])) == 2
    assert "is being run by another process" in capsys.readouterr().err
