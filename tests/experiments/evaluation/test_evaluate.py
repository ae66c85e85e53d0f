"""Evaluations in several processes, disturbed ones and resumed ones, against one serial undisturbed evaluation.

All in the real simulator, with the agent of `wandering_agent.py`.
"""

import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wandering_agent import STEPS, Kills, Wanders, already_done, children, plan_into

from experiments.robot.libero.evaluation.evaluate import Listeners, evaluate, num_workers
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.results.journal import read_journals
from experiments.robot.libero.results.results import FILE_NAME, EpisodeRecord, Results
from experiments.robot.libero.rollouts.machine import default_workers
from experiments.robot.libero.settings.flags import EvaluationConfig
from prismatic.machine import read_machine


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_error_that_stays_is_invalid_and_no_failure(serial: Results, tmp_path: Path, num_envs: int) -> None:
    plan = plan_into(tmp_path, num_envs=num_envs, max_policy_failures=100)
    results = evaluate(plan, BreaksOn("put the bowl on the plate", -1), ["eval"])
    good, bad = results.episodes[:2], results.episodes[2:]
    assert [e.actions_sha256 for e in good] == [e.actions_sha256 for e in serial.episodes[:2]]
    assert all(e.success is None and e.attempts == 3 and "on fire" in (e.invalid or "") for e in bad)
    assert results.summary()["all"]["trials"] == 2 and results.summary()["all"]["invalid"] == 2
    # Gone on with when the trouble is over, the evaluation is what it would have been.
    mended = evaluate(plan_into(tmp_path, num_envs=num_envs, resume=True), Wanders(), ["eval"])
    assert mended.outcome() == serial.outcome()


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
    assert num_workers(EvaluationConfig(num_envs=4)) == 4
    assert num_workers(EvaluationConfig()) == default_workers(read_machine())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert num_workers(EvaluationConfig()) == 1 and num_workers(EvaluationConfig(num_envs=4)) == 4
