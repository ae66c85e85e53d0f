"""Evaluations in several processes, disturbed ones and resumed ones, against one serial undisturbed evaluation.

All in the real simulator. The agent moves the arm by what it is asked for, in a way that depends on the picture, the
state, and the seed of the policy query: whatever goes astray on the way changes the actions, and with them the hashes.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.evaluation import conventions
from experiments.robot.libero.evaluation.evaluate import Listeners, evaluate, num_workers
from experiments.robot.libero.evaluation.plan import Plan, make_plan
from experiments.robot.libero.evaluation.resume import check_resumable, check_same_policy
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.results.journal import Journal, load_results, read_journals
from experiments.robot.libero.results.provenance import collect_versions, git_commit
from experiments.robot.libero.results.results import FILE_NAME, EpisodeRecord, Results
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.vla.robots import LIBERO

STEPS = 16


class Wanders:
    """Small motions, a pure function of what is asked."""

    robot = LIBERO
    cameras = ("full_image", "wrist_image")
    center_crop = False

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def description(self) -> dict[str, Any]:
        own = "libero_spatial_no_noops"
        return {"checkpoint": "wanders", "assumptions": [], "device_name": "cpu", "unnorm_key": own}

    def close(self) -> None:
        pass

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        self.sizes.append(len(queries))
        return [self._chunk(query) for query in queries]

    def _chunk(self, query: PolicyQuery) -> ActionChunk:
        picture = query.observation["full_image"].astype(np.int64).sum()
        rng = np.random.default_rng([query.seed, int(picture)])
        actions = rng.uniform(-0.5, 0.5, (8, 7)) + 0.1 * np.asarray(query.observation["state"])[:7]
        return ActionChunk(actions, rng.random(98) < 0.2, np.ones(98, np.float32), {"total": 1.0})


class Kills(Wanders):
    """Kills a simulator process at the n-th queries, or stops it so that it says nothing any more."""

    def __init__(self, at: set[int], how: signal.Signals) -> None:
        super().__init__()
        self.at, self.how, self.queries = at, how, 0
        self.struck: list[int] = []

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        self.queries += 1
        if self.queries in self.at:
            victim = next(pid for pid in children() if pid not in self.struck)
            self.struck.append(victim)
            os.kill(victim, self.how)
        return super().query(queries)


def children() -> list[int]:
    """This process's simulator processes."""
    task = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, task) if b"rollouts.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def plan_into(folder: Path, **flags: Any) -> Plan:
    given = {"task_suite_name": "libero_goal", "task_ids": "1,8", "initial_states": "30-31", "wide_starts_m": 0.06}
    given |= {"renderer": "fast", "env_img_res": 64, "num_steps_wait": 2, "pretrained_checkpoint": "x"}
    config = EvaluationConfig(**{**given, "output_dir": str(folder), "num_envs": 1, **flags})  # type: ignore[arg-type]
    return replace(make_plan(config), max_steps=STEPS)


def already_done(folder: Path, results: Results, count: int) -> None:
    """Leave the first rollouts as an evaluation leaves them that was stopped before it wrote its results again."""
    with Journal(folder) as journal:
        for record in results.episodes[:count]:
            journal.append(record)
    replace(results, run={**results.run, "complete": False}, episodes=[]).save(folder / FILE_NAME)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The undisturbed evaluation, one rollout after the other in this process."""
    return evaluate(plan_into(tmp_path_factory.mktemp("serial")), Wanders(), ["eval"])


def test_the_serial_evaluation_is_whole(serial: Results) -> None:
    assert [(e.task_index, e.initial_state) for e in serial.episodes] == [(t, s) for t in (1, 8) for s in (30, 31)]
    assert all(e.invalid is None and e.steps == STEPS and e.attempts == 1 for e in serial.episodes)
    assert len({e.actions_sha256 for e in serial.episodes}) == 4
    assert serial.run["complete"] and serial.run["num_envs"] == 1
    assert any("statistics of libero_spatial_no_noops, not of libero_goal" in text for text in serial.run["warnings"])


@pytest.mark.parametrize("batch_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_find_what_one_finds(serial: Results, tmp_path: Path, batch_size: int) -> None:
    agent = Wanders()
    results = evaluate(plan_into(tmp_path, num_envs=2, batch_size=batch_size), agent, ["eval"])
    assert results.outcome() == serial.outcome()
    assert results.run["num_envs"] == 2 and results.run["worker_restarts"] == 0
    assert Results.load(tmp_path).outcome() == serial.outcome()
    assert max(agent.sizes) <= batch_size and sum(agent.sizes) == 4 * STEPS / 8
    assert not children()


def test_killed_simulators_are_replaced_and_their_rollouts_repeated(serial: Results, tmp_path: Path) -> None:
    results = evaluate(plan_into(tmp_path, num_envs=2), Kills({2, 5}, signal.SIGKILL), ["eval"])
    assert results.outcome() == serial.outcome()
    assert results.run["worker_restarts"] == 2
    assert sum(episode.attempts - 1 for episode in results.episodes) == 2


@pytest.mark.slow
def test_a_simulator_that_hangs_is_replaced(serial: Results, tmp_path: Path) -> None:
    plan = plan_into(tmp_path, num_envs=2, worker_timeout_s=20.0)
    results = evaluate(plan, Kills({4}, signal.SIGSTOP), ["eval"])
    assert results.outcome() == serial.outcome() and results.run["worker_restarts"] == 1


class BreaksOn(Wanders):
    """Raises for the instruction of one task, at its first policy queries only or always."""

    def __init__(self, instruction: str, times: int) -> None:
        super().__init__()
        self.instruction, self.times = instruction, times

    def _chunk(self, query: PolicyQuery) -> ActionChunk:
        if query.instruction == self.instruction and self.times:
            self.times -= 1
            raise RuntimeError("the GPU is on fire")
        return super()._chunk(query)


@pytest.mark.parametrize("num_envs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_that_passes_is_no_result(serial: Results, tmp_path: Path, num_envs: int) -> None:
    results = evaluate(plan_into(tmp_path, num_envs=num_envs), BreaksOn("put the bowl on the plate", 2), ["eval"])
    assert results.outcome() == serial.outcome()
    assert sum(episode.attempts - 1 for episode in results.episodes) == 2


@pytest.mark.slow
def test_one_bad_query_of_a_batch_spoils_no_other_rollout(serial: Results, tmp_path: Path) -> None:
    plan = plan_into(tmp_path, num_envs=2, batch_size=2)
    results = evaluate(plan, BreaksOn("put the bowl on the plate", 2), ["eval"])
    assert results.outcome() == serial.outcome()
    assert [episode.attempts for episode in results.episodes[:2]] == [1, 1]


class Slow(Wanders):
    """Thinks for as long as no simulator may be silent."""

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        time.sleep(12.0)
        return super().query(queries)


class KeepsBusy(Kills):
    """Takes its time, so that one query always waits for another."""

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        time.sleep(0.4)
        return super().query(queries)


@pytest.mark.slow
def test_a_busy_policy_notices_a_simulator_that_hangs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags: dict[str, Any] = {"num_envs": 3, "worker_timeout_s": 20.0, "initial_states": "30", "task_ids": "1,4,8"}
    plan = replace(plan_into(tmp_path, **flags), max_steps=8 * 60)
    noticed: list[bool] = []
    listeners = Listeners(episode=lambda record: noticed.append("sent nothing for 20 seconds" in caplog.text))
    results = evaluate(plan, KeepsBusy({12}, signal.SIGSTOP), ["eval"], listeners)
    assert noticed == [True] * 3, "the other two rollouts take 48 seconds, all of them spent on queries"
    assert results.run["worker_restarts"] == 1 and sorted(e.attempts for e in results.episodes) == [1, 1, 2]


@pytest.mark.slow
def test_a_slow_policy_is_no_silence_of_its_simulators(tmp_path: Path) -> None:
    plan = replace(plan_into(tmp_path, num_envs=2, worker_timeout_s=20.0, initial_states="30"), max_steps=16)
    results = evaluate(plan, Slow(), ["eval"])
    assert results.run["worker_restarts"] == 0 and [episode.attempts for episode in results.episodes] == [1, 1]


@pytest.mark.parametrize("num_envs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_cannot_be_saved_is_invalid_and_says_why(tmp_path: Path, num_envs: int) -> None:
    (tmp_path / "videos").write_text("in the way")
    flags = {"num_envs": num_envs, "initial_states": "30", "task_ids": "1", "max_attempts": 2}
    results = evaluate(plan_into(tmp_path, save_rollout_video=True, **flags), Wanders(), ["eval"])
    (episode,) = results.episodes
    assert episode.success is None and episode.video is None and episode.attempts == 2
    assert "videos" in (episode.invalid or "") and "Traceback" in (episode.invalid or "")
    assert results.run["worker_restarts"] == 0


@pytest.mark.slow
def test_the_last_rollout_cannot_take_the_policy_with_it(serial: Results, tmp_path: Path) -> None:
    already_done(tmp_path, serial, 3)
    results = evaluate(plan_into(tmp_path, num_envs=2, resume=True), Kills({1}, signal.SIGKILL), ["eval"])
    assert results.outcome() == serial.outcome()
    assert results.run["worker_restarts"] == 1 and results.episodes[-1].attempts == 2


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
    begun = Results(run, asdict(config), agent.description(), collect_versions())
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
    done = evaluate(plan_into(tmp_path, resume=True), BreaksOn("", -1), ["eval"])
    assert done.outcome() == serial.outcome(), "all was done already, by the results alone"


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


@pytest.mark.parametrize("num_envs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_that_stays_is_invalid_and_no_failure(serial: Results, tmp_path: Path, num_envs: int) -> None:
    plan = plan_into(tmp_path, num_envs=num_envs)
    results = evaluate(plan, BreaksOn("put the bowl on the plate", -1), ["eval"])
    good, bad = results.episodes[:2], results.episodes[2:]
    assert [e.actions_sha256 for e in good] == [e.actions_sha256 for e in serial.episodes[:2]]
    assert all(e.success is None and e.attempts == 3 and "on fire" in (e.invalid or "") for e in bad)
    assert results.summary()["all"]["trials"] == 2 and results.summary()["all"]["invalid"] == 2
    # Gone on with when the trouble is over, the evaluation is what it would have been.
    mended = evaluate(plan_into(tmp_path, num_envs=num_envs, resume=True), Wanders(), ["eval"])
    assert mended.outcome() == serial.outcome()


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
def test_weights_that_changed_are_noticed_in_every_time_zone(
    serial: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    checkpoint, folder = tmp_path / "policy", tmp_path / "evaluation"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").touch()
    agent = Wanders()
    monkeypatch.setattr(Wanders, "description", lambda self: {"checkpoint": str(checkpoint), "assumptions": []})
    began = datetime(2026, 3, 4, 12, 0, 0, tzinfo=timezone.utc)
    earlier = replace(serial, policy=agent.description(), config={**serial.config, "output_dir": str(folder)})
    earlier.run = {**serial.run, "started": began.strftime("%Y-%m-%dT%H:%M:%S%z")}
    folder.mkdir()
    earlier.save(folder / FILE_NAME)
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for seconds, refused in ((-3600, False), (0.5, False), (60, True)):
            os.utime(checkpoint / "model.safetensors", times=(began.timestamp() + seconds,) * 2)
            with pytest.raises(ValueError, match="was written after it began") if refused else nullcontext():
                check_resumable(plan_into(folder, resume=True))
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_an_interrupted_evaluation_loses_nothing(serial: Results, tmp_path: Path) -> None:
    seen: list[EpisodeRecord] = []

    def interrupt(record: EpisodeRecord) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan_into(tmp_path, num_envs=2), Wanders(), ["eval"], Listeners(episode=interrupt))
    assert not children()
    stopped = Results.load(tmp_path)
    assert len(read_journals(tmp_path)) == 2 and not stopped.run["complete"]
    stopped.run |= {"started": "2026-01-02T03:04:05+0900", "worker_restarts": 3}
    stopped.save(tmp_path / FILE_NAME)
    begun: list[tuple[int, int]] = []
    again: list[EpisodeRecord] = []
    listeners = Listeners(lambda total, done: begun.append((total, len(done))), again.append)
    results = evaluate(plan_into(tmp_path, num_envs=2, resume=True), Wanders(), ["eval"], listeners)
    assert results.outcome() == serial.outcome()
    assert begun == [(4, 2)] and len(again) == 2
    assert results.run["started"] == stopped.run["started"] and results.run["worker_restarts"] == 3


def test_processes_are_as_many_as_make_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluationConfig(num_envs=4)
    assert num_workers(config, 10) == 4 and num_workers(config, 3) == 3 and num_workers(config, 0) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert num_workers(EvaluationConfig(), 1000) == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert num_workers(EvaluationConfig(), 1000) == 1 and num_workers(config, 1000) == 4
