"""The evaluation itself: every start of a plan is rolled out, in one process or many, and can be gone on with later."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.robot.libero.evaluation import conventions
from experiments.robot.libero.evaluation.plan import Plan
from experiments.robot.libero.evaluation.resume import changed_conditions, earlier_rollouts
from experiments.robot.libero.policies.checkpoint import scaling_warnings
from experiments.robot.libero.policies.contract import Agent, Queryable
from experiments.robot.libero.policies.watched import WatchedPolicy, watchdog
from experiments.robot.libero.results.journal import Journal
from experiments.robot.libero.results.naming import policy_name
from experiments.robot.libero.results.provenance import collect_versions, git_commit
from experiments.robot.libero.results.results import FILE_NAME, TIME_FORMAT, EpisodeRecord, Results
from experiments.robot.libero.rollouts.machine import default_workers
from experiments.robot.libero.rollouts.rollout import RolloutSettings
from experiments.robot.libero.rollouts.runner import (
    EnvironmentSettings,
    EpisodeRunner,
    EpisodeSettings,
    RecordSettings,
    VideoSettings,
)
from experiments.robot.libero.rollouts.schedule import Schedule
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.rollouts.worker_pool import WorkerPool
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.settings.suite_names import suites_of
from prismatic.machine import read_machine
from prismatic.training.distributed import Ranks


@dataclass(frozen=True)
class Listeners:
    """Told how an evaluation goes.

    Args:
        begin: how many rollouts this process has to do, those done before included, and the records of the latter.
        episode: a rollout has ended.
    """

    begin: Callable[[int, Sequence[EpisodeRecord]], None] = lambda total, done: None
    episode: Callable[[EpisodeRecord], None] = lambda record: None


def evaluate(
    plan: Plan,
    agent: Agent,
    command: Sequence[str],
    listeners: Listeners | None = None,
    ranks: Ranks | None = None,
    journal: Journal | None = None,
) -> Results:
    """Roll out every start. Each rollout is on the disk as soon as it ends; `results.json` follows.

    Of several processes (`ranks`) each takes every n-th start; all return the merged results, and the main one writes
    them.

    Args:
        command: The command line, for the record.
        journal: of this process, open; None opens it for as long as this lasts.

    Raises:
        JournalInUse: when another process evaluates into the same folder.
        PolicyLost: when the policy failed at `--max_policy_failures` queries in a row. Rollouts that became invalid
            over them are not recorded.
        SimulatorsUnusable: when no simulator process can start.
        OSError: ENOSPC, when the disk is full. What ended before is on it, and can be gone on with, as ever.
    """
    listeners, ranks = listeners or Listeners(), ranks or Ranks(0, 1, torch.device("cpu"))
    if journal is None:
        with Journal(plan.output_dir, ranks.rank, ranks.world_size) as journal:
            return _evaluate(plan, agent, command, listeners, ranks, journal)
    return _evaluate(plan, agent, command, listeners, ranks, journal)


def _evaluate(
    plan: Plan, agent: Agent, command: Sequence[str], listeners: Listeners, ranks: Ranks, journal: Journal
) -> Results:
    workers = num_workers(plan.config)
    results = _empty_results(plan, agent, command, ranks, workers)
    order = {start.key: place for place, start in enumerate(itertools.chain(*plan.starts))}
    before, earlier = earlier_rollouts(plan) if plan.config.resume else ([], {})
    seconds, restarts = earlier.get("seconds", 0.0), earlier.get("worker_restarts", 0)
    found = {record.key: record for share in ranks.gather(before) for record in share}
    are_all = len(found) == len(order)
    of_then = ("started", "command", *(("git_commit", "device") if are_all else ()))
    conditions = changed_conditions(earlier, results, len(before), are_all)
    results.run |= {key: earlier[key] for key in of_then if key in earlier}
    results.run["warnings"] = list(dict.fromkeys([*results.run["warnings"], *conditions]))
    left = shares(plan.starts, set(found), ranks.rank, ranks.world_size)
    results.episodes = sorted(found.values(), key=lambda record: order[record.key])
    results.run |= {"seconds": seconds, "worker_restarts": restarts}
    listeners.begin(len(found) + sum(map(len, left)), results.episodes)

    writer = _Writer(plan.output_dir / FILE_NAME, ranks.is_main)
    began = time.perf_counter()
    writer.save(results)
    journal.begin(results)
    ranks.barrier()  # no rollout is on the disk before what it belongs to is
    try:
        with contextlib.closing(_records(plan, agent, left, workers)) as records:
            for record, restarted in records:
                journal.append(record)
                results.run["worker_restarts"] = restarts + restarted
                bisect.insort(results.episodes, record, key=lambda record: order[record.key])
                results.run["seconds"] = round(seconds + time.perf_counter() - began, 1)
                writer.save_now_and_then(results)
                listeners.episode(record)
    finally:
        writer.save(results)
    merged = {record.key: record for share in ranks.gather(results.episodes) for record in share}
    results.episodes = sorted(merged.values(), key=lambda record: order[record.key])
    results.run["worker_restarts"] = restarts + sum(ranks.gather(results.run["worker_restarts"] - restarts))
    results.run["seconds"] = max(ranks.gather(results.run["seconds"]))
    results.run["complete"] = len(results.episodes) == len(order)
    writer.save(results)
    return results


def shares(starts: Sequence[Sequence[Start]], done: set[Any], rank: int, world_size: int) -> list[list[Start]]:
    """The starts that one of `world_size` processes rolls out, task by task.

    What is left is dealt out one by one, so that every process gets its part of every task.
    """
    left = [[start for start in task if start.key not in done] for task in starts]
    places = itertools.count()
    return [[start for start in task if next(places) % world_size == rank] for task in left]


def _records(
    plan: Plan, agent: Agent, starts: Sequence[Sequence[Start]], workers: int
) -> Generator[tuple[EpisodeRecord, int]]:
    """A record for every start, in the order in which they end, and how often a simulator has been replaced so far."""
    config = plan.config
    policy = WatchedPolicy(agent, config.max_policy_failures)
    waiting: list[EpisodeRecord] = []
    restarts = 0
    hint = f"go on with the same command and --resume True --output_dir {plan.output_dir}"
    # A server's replies have the same limit, by the connection's own clock.
    watch = contextlib.nullcontext() if config.policy_url else watchdog(policy, config.policy_timeout_s, hint)
    with watch, contextlib.closing(_rolled_out(plan, agent, policy, starts, workers)) as records:
        for record, restarts in records:
            # As long as the policy fails, an invalid rollout may be its fault, and then it is no result.
            if record.invalid is not None and policy.failures:
                waiting.append(record)
                continue
            if not policy.failures:
                yield from ((earlier, restarts) for earlier in waiting)
                waiting = []
            yield record, restarts
    yield from ((earlier, restarts) for earlier in waiting)


def _rolled_out(
    plan: Plan, agent: Agent, policy: WatchedPolicy, starts: Sequence[Sequence[Start]], workers: int
) -> Generator[tuple[EpisodeRecord, int]]:
    config, schedule = plan.config, Schedule(starts, plan.config.max_attempts)
    settings = episode_settings(plan, agent)
    # By what was asked for: one rollout that kills its simulator must not be left to kill the policy.
    if workers == 1:
        yield from ((record, 0) for record in _records_in_this_process(settings, policy, schedule))
    elif rollouts := sum(map(len, starts)):
        workers = min(workers, rollouts)
        # A server gets each policy query by itself, and all that wait at once.
        batch_size = config.batch_size or (workers if config.policy_url else 1)
        with WorkerPool(settings, policy, workers, config.worker_timeout_s, batch_size) as pool:
            for record in pool.run(schedule):
                yield record, pool.restarts


def _records_in_this_process(
    settings: EpisodeSettings, agent: Queryable, schedule: Schedule
) -> Iterator[EpisodeRecord]:
    runner = EpisodeRunner(settings, agent)
    start: Start | None = None
    try:
        while (start := schedule.take(start)) is not None:
            record = runner.run(start)
            if schedule.settle(start, record):
                yield record
    finally:
        runner.close()


def num_workers(config: EvaluationConfig) -> int:
    """Simulator processes: as the flag says, else this process's share of the cores and of the memory that is left."""
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes on this machine
    return config.num_envs or default_workers(read_machine(), neighbours)


def episode_settings(plan: Plan, agent: Agent) -> EpisodeSettings:
    """What the processes that simulate must know."""
    config = plan.config
    return EpisodeSettings(
        rollout=RolloutSettings(
            max_steps=plan.max_steps,
            open_loop_steps=config.open_loop_steps(agent.robot),
            control=config.control,
            blank_images=config.control == "blank_images",
            cameras=agent.cameras,
            render_every_step=config.render_every_step,
        ),
        environment=EnvironmentSettings(
            resolution=config.env_img_res,
            render=plan.renders,
            seed=config.seed,
            renderer=config.renderer,
            settle_steps=config.num_steps_wait,
            canonical_quaternion=agent.robot.canonical_quaternion,
        ),
        output_dir=plan.output_dir,
        video=VideoSettings(
            every_steps=config.video_every_steps,
            max_per_task=config.max_videos_per_task,
            center_crop=agent.center_crop,
            control_rate_hz=agent.robot.control_rate_hz,
            only_failures=config.save_rollout_video == "failures",
        )
        if config.save_rollout_video
        else None,
        record=RecordSettings(agent.center_crop, agent.robot.control_rate_hz, agent.description())
        if config.record
        else None,
        name_suites=len(suites_of(config.task_suite_name)) > 1,
        probes=plan.probes,
    )


def _empty_results(plan: Plan, agent: Agent, command: Sequence[str], ranks: Ranks, workers: int) -> Results:
    config, description = plan.config, dict(agent.description())
    settings, versions = episode_settings(plan, agent).rollout, collect_versions()
    return Results(
        run={
            "command": list(command),
            "started": time.strftime(TIME_FORMAT),
            "git_commit": git_commit(),
            "policy": policy_name(description),
            "device": description.pop("device_name", "unknown"),
            "renderer": config.renderer,
            "rendering_backend": plan.backend,
            "seed": config.seed,
            "protocol": conventions.describe(config, settings.max_steps, settings.open_loop_steps, agent.center_crop),
            "warnings": [
                *conventions.version_warnings(versions),
                *plan.warnings,
                *scaling_warnings(description, suites_of(config.task_suite_name)),
            ],
            "num_envs": workers,
            "processes": ranks.world_size,
            "worker_restarts": 0,
            "complete": False,
        },
        config=asdict(config),
        policy=description,
        versions=versions,
    )


class _Writer:
    """Writes `results.json`, seldom enough to cost a few percent of the time at most, however long it has become."""

    def __init__(self, path: Path, active: bool) -> None:
        self._path = path
        self._active = active
        self._next = 0.0

    def save(self, results: Results) -> None:
        if self._active:
            results.save(self._path)

    def save_now_and_then(self, results: Results) -> None:
        began = time.monotonic()
        if began >= self._next:
            self.save(results)
            self._next = time.monotonic() + 20 * (time.monotonic() - began)
