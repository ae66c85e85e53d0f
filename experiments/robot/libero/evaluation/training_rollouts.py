"""Short rollouts of a policy while it is trained: a callback of the training, by the parts of an evaluation."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from experiments.robot.libero.evaluation.evaluate import episode_settings, num_workers
from experiments.robot.libero.evaluation.plan import Plan, make_plan
from experiments.robot.libero.policies.checkpoint import own_keys
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery, Queryable
from experiments.robot.libero.policies.local import PolicyAgent
from experiments.robot.libero.policies.watched import PolicyLost, WatchedPolicy
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.results.success import success_rows
from experiments.robot.libero.rollouts.schedule import Schedule
from experiments.robot.libero.rollouts.worker_pool import SimulatorsUnusable, WorkerPool
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.settings.suite_names import suites_of
from experiments.robot.libero.settings.training_flags import RolloutFlags, suite_of_dataset
from experiments.robot.libero.simulator.backend import RenderingUnavailable, draw_on_own_gpu
from prismatic.policy import Policy
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import dataset_specs
from prismatic.training.logging import JsonLines
from prismatic.training.preemption import StopRequest
from prismatic.vla.datasets.mixture import parse_mixture
from prismatic.vla.robots import LIBERO, misfits

log = logging.getLogger(__name__)

FOLDER = "rollouts"
"""Of the run, with a folder per step, which holds the video."""
LINES_FILE = "rollouts.jsonl"
_FLAGS = {
    "task_suite_name": "rollout_suite",
    "task_ids": "rollout_tasks",
    "initial_states": "rollout_states",
    "env_img_res": "rollout_resolution",
    "renderer": "rollout_renderer",
    "num_envs": "rollout_envs",
}
"""An evaluation's flag -> what it is called here."""


class TrainingRollouts:
    """A `Callback` of a run: rolls its policy out, in simulator processes that live as long as that takes."""

    def __init__(self, flags: RolloutFlags, config: FinetuneConfig, simulates: bool, processes: int = 1) -> None:
        """Args:
            flags: which rollouts, and when.
            config: of the run.
            simulates: whether this process is the one that rolls out; only it needs a simulator.
            processes: of the run.

        Raises:
            ValueError: for flags that cannot be used, or a robot that is not LIBERO's.
            ImportError: where the simulator is not installed.
            RenderingUnavailable: where nothing can be drawn.
        """
        self._freq, self._last = flags.rollout_freq, config.max_steps
        self._run_dir = config.run_dir
        self._plan = _plan(flags, config, processes) if simulates else None

    def is_due(self, step: int) -> bool:
        """Every so many steps, and behind the last one."""
        return step % self._freq == 0 or step == self._last

    def rewind(self, step: int) -> None:
        """Drop what is told of rollouts behind `step`, and their videos."""
        if (lines := self._run_dir / LINES_FILE).is_file():
            JsonLines(lines, step).close()
        for folder in (self._run_dir / FOLDER).glob("step_*"):
            if folder.name.removeprefix("step_").isdecimal() and int(folder.name.removeprefix("step_")) > step:
                shutil.rmtree(folder, ignore_errors=True)

    def __call__(self, step: int, policy: Policy, stop: StopRequest) -> Mapping[str, float]:
        """Roll out, write a line per valid rollout and the video of the first; returns the success rate.

        What the simulators, a full disk or a policy that fails bring about is told in the log, and training goes on.
        """
        assert self._plan is not None
        plan = replace(self._plan, output_dir=self._run_dir / FOLDER / f"step_{step:08d}")
        began = time.monotonic()
        try:
            records = _roll_out(plan, _agent(policy, suites_of(plan.config.task_suite_name)), stop)
            self._write(step, plan, records)
        except (SimulatorsUnusable, PolicyLost, OSError) as error:
            log.warning("step %d  no rollouts: %s", step, error)
            return {}
        valid = [record for record in records if record.invalid is None]
        if not valid:
            log.warning("step %d  none of %d rollouts says anything about the policy", step, len(records))
            return {"rollouts_invalid": len(records)}
        *tasks, together = success_rows(records)
        told = ", ".join(f"{row.name} {row.solved}" for row in tasks if row.is_task)
        seconds = time.monotonic() - began
        log.info("step %d  rollouts: %s solved (%s) in %.0f s", step, together.solved, told, seconds)
        rate = sum(bool(record.success) for record in valid) / len(valid)
        invalid = {"rollouts_invalid": len(records) - len(valid)} if len(valid) < len(records) else {}
        return {"rollout_success_rate": rate, "rollouts": len(valid), "rollout_seconds": round(seconds, 1), **invalid}

    def _write(self, step: int, plan: Plan, records: Sequence[EpisodeRecord]) -> None:
        with contextlib.closing(JsonLines(self._run_dir / LINES_FILE, step)) as lines:
            for record in records:
                if record.invalid is not None:  # a crash is no result; the log has said why
                    continue
                line = {
                    "suite": record.suite,
                    "task": record.task_index,
                    "instruction": record.instruction,
                    "initial_state": record.initial_state,
                    "success": record.success,
                    "steps": record.steps,
                    "video": record.video and str((plan.output_dir / record.video).relative_to(self._run_dir)),
                }
                lines.write(step, line)


def _plan(flags: RolloutFlags, config: FinetuneConfig, processes: int) -> Plan:
    """What is rolled out each time; raises as `TrainingRollouts`."""
    (spec, _), *_ = dataset_specs(config)
    for fact in misfits(spec.robot, LIBERO):
        raise ValueError(
            f"--rollout_freq {flags.rollout_freq}: dataset {spec.name!r} is of robot {spec.robot.name!r}, which "
            f"differs from LIBERO's in {fact}; leave rollouts out"
        )
    draw_on_own_gpu(processes)
    try:
        return make_plan(
            EvaluationConfig(
                pretrained_checkpoint=config.vla_path,
                task_suite_name=flags.rollout_suite or _suites_of_data(config),
                task_ids=flags.rollout_tasks,
                initial_states=flags.rollout_states,
                env_img_res=flags.rollout_resolution,
                renderer=flags.rollout_renderer,
                num_envs=flags.rollout_envs,
                save_rollout_video=importlib.util.find_spec("imageio_ffmpeg") is not None,
                output_dir=str(config.run_dir / FOLDER / "step_00000000"),  # of which there are none
            )
        )
    except ValueError as error:
        ours = re.sub(r"--(\w+)", lambda flag: f"--{_FLAGS.get(flag[1], flag[1])}", str(error))
        raise ValueError(ours) from error


def _suites_of_data(config: FinetuneConfig) -> str:
    """The suites whose names the run's datasets begin with, as `--task_suite_name` takes them."""
    names = parse_mixture(config.dataset_name)
    found = {name: suite_of_dataset(name) for name in names}
    if unknown := [name for name, suite in found.items() if suite is None]:
        raise ValueError(
            f"--rollout_suite is missing: the name of dataset {unknown[0]!r} begins with no suite's; give one, such as "
            "libero_goal"
        )
    return ",".join(dict.fromkeys(filter(None, found.values())))


def _agent(policy: Policy, suites: Sequence[str]) -> PolicyAgent:
    """The policy, in each suite with the statistics of the dataset that is of it."""
    checkpoint, transform = policy.checkpoint, policy.transform
    by_suite = {}
    for suite in suites:
        known = [*(key for key in own_keys(suite) if key in policy.norm_stats)]
        known += [key for key in policy.norm_stats if suite_of_dataset(key) == suite]
        if known and known[0] != policy.unnorm_key:
            own = checkpoint.transform(known[0], transform.center_crop, use_proprio=transform.use_proprio)
            by_suite[suite] = Policy(checkpoint, own, known[0], policy.engine)
    return PolicyAgent(policy, by_suite)


def _roll_out(plan: Plan, agent: PolicyAgent, stop: StopRequest) -> list[EpisodeRecord]:
    """A record of every start, in order. Raises SimulatorsUnusable, PolicyLost (also once the run is to end), OSError.

    Simulators are processes of their own, however few: what goes wrong in one must not end the training.
    """
    settings = episode_settings(plan, agent)
    if settings.video is not None:
        settings = replace(settings, video=replace(settings.video, only=plan.starts[0][0].key))
    watched = _UntilAsked(WatchedPolicy(agent, plan.config.max_policy_failures), stop)
    schedule = Schedule(plan.starts, plan.config.max_attempts)
    order = [start.key for task in plan.starts for start in task]
    workers = min(num_workers(plan.config), len(order))
    with WorkerPool(settings, watched, workers, plan.config.worker_timeout_s) as pool:
        return sorted(pool.run(schedule), key=lambda record: order.index(record.key))


class _UntilAsked:
    """An agent that answers until the run is asked to end."""

    def __init__(self, agent: Queryable, stop: StopRequest) -> None:
        self._agent = agent
        self._stop = stop

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        """As the agent's. Raises PolicyLost once the run has been asked to end."""
        if self._stop.signal is not None:
            raise PolicyLost(f"{self._stop.signal} asked the run to end")
        return self._agent.query(queries)


def make_rollouts(flags: RolloutFlags, config: FinetuneConfig, rank: int, processes: int) -> list[TrainingRollouts]:
    """The callback that the flags ask for, if they do. Raises ValueError where it cannot be had, with the remedy."""
    if flags.rollout_freq < 0:
        raise ValueError(f"--rollout_freq {flags.rollout_freq}: expected 0 or more")
    if flags.rollout_freq == 0:
        return []
    try:
        return [TrainingRollouts(flags, config, rank == 0, processes)]
    except (ImportError, RenderingUnavailable) as error:
        raise ValueError(f"--rollout_freq {flags.rollout_freq}: {error}") from error
