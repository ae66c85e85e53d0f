"""The command: roll out as `lightvla eval` does, look at what kept tokens lie on, blank some of them, report."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from rich.console import Console
from rich.logging import RichHandler

from experiments.robot.libero.evaluation.plan import Plan, make_plan
from experiments.robot.libero.evaluation.resume import (
    check_resumable,
    check_same_policy,
    check_same_weights,
    earlier_rollouts,
)
from experiments.robot.libero.evaluation.terminal import GoesOn, evaluate_with_progress
from experiments.robot.libero.evaluation.wandb_log import WandbLog
from experiments.robot.libero.looks.config import BLANKED, UNBLANKED, LooksConfig
from experiments.robot.libero.looks.counts import count
from experiments.robot.libero.looks.pictures import draw
from experiments.robot.libero.looks.probe import Looking
from experiments.robot.libero.looks.report import NAMES, Looks, picture_stem, write_reports
from experiments.robot.libero.looks.seen import Seen, read_all
from experiments.robot.libero.policies.choice import make_agent, weights_of
from experiments.robot.libero.policies.local import PolicyAgent
from experiments.robot.libero.policies.watched import PolicyLost
from experiments.robot.libero.results.journal import Journal
from experiments.robot.libero.results.results import EpisodeRecord, Results, is_complete
from experiments.robot.libero.rollouts.worker_pool import SimulatorsUnusable
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.settings.suite_names import suites_of
from experiments.robot.libero.simulator.backend import RenderingUnavailable, draw_on_own_gpu
from prismatic.command_status import INVALID, STOPPED, UNUSABLE, print_error
from prismatic.models.autoregressive import AUTOREGRESSIVE
from prismatic.models.pruners.blanking import why_not
from prismatic.report.data import counted
from prismatic.training.distributed import Ranks, resolve_device

TAKEN = "lightvla looks --blank "
"""How a warning begins that a condition's own results carry."""
PICTURED = 4
"""Of so many first rollouts of a task pictures are kept, to show one that was solved."""
_REFUSALS = (ValueError, FileNotFoundError, ImportError, RenderingUnavailable, OSError)


def main(config: LooksConfig, command: list[str], console: Console) -> int:
    """Check, load, roll out, report; returns the exit status."""
    try:
        plans, agent = prepared(config, console)
    except _REFUSALS as error:
        print_error(error)
        return UNUSABLE
    return explore(config, plans, agent, command, console)


def explore(
    config: LooksConfig, plans: dict[str, Plan], agent: PolicyAgent, command: list[str], console: Console
) -> int:
    """Roll out and report what has been checked; returns the exit status."""
    device = torch.device(agent.policy.model.device)
    try:
        with contextlib.closing(agent):
            results = {name: _roll_out(plan, agent, command, console, device) for name, plan in plans.items()}
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
        return STOPPED
    except (PolicyLost, SimulatorsUnusable, OSError) as error:
        print_error(f"{error}; the same command goes on")
        return UNUSABLE
    several = len(suites_of(config.task_suite_name)) > 1
    invalid = sum(record.invalid is not None for each in results.values() for record in each.episodes)
    if all(record.invalid is not None for record in results[UNBLANKED].episodes):
        cause = str(results[UNBLANKED].episodes[0].invalid).splitlines()[-1]
        print_error(f"no rollout came to its end ({cause}); the same command tries again")
        return INVALID
    try:
        found = {name: read_all(plans[name].output_dir, each.episodes, several) for name, each in results.items()}
        rollouts = [count(record, seen, name) for name, each in found.items() for record, seen in each]
        Looks(_made(config, command, results), rollouts).save(config.output_dir / NAMES[0])
        _draw(found[UNBLANKED], config, agent)
        written = write_reports(config.output_dir)
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        return UNUSABLE
    for path in written:
        console.print(f"report: {path}", soft_wrap=True, markup=False, highlight=False)
    if invalid:
        console.print(f"{counted(invalid, 'invalid rollout')} left out; the same command tries again")
    return INVALID if invalid else 0


def prepared(config: LooksConfig, console: Console) -> tuple[dict[str, Plan], PolicyAgent]:
    """A plan per condition, and the loaded policy.

    Raises ValueError and the like for whatever can be refused, before any rollout.
    """
    asked = config.conditions()
    # What was asked before stays in the report, and in the correction for how much was asked.
    before = [name for name in BLANKED if name not in asked and is_complete(config.rollouts(name))]
    conditions = [UNBLANKED, *(name for name in BLANKED if name in (*asked, *before))]
    for package in ("imageio_ffmpeg", "matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the report needs {package}: pip install 'lightvla[libero,report]'")
    device = resolve_device(config.device)
    draw_on_own_gpu(1)
    plan = make_plan(config.evaluation(UNBLANKED))
    plans = {name: check_resumable(_in_own_folder(plan, config.evaluation(name))) for name in conditions}
    several = len(suites_of(config.task_suite_name)) > 1
    for each in plans.values():  # what is kept must be readable, or the report fails after hours
        read_all(each.output_dir, earlier_rollouts(each)[0], several)
    fingerprint = weights_of(plan.config)
    plans = {name: check_same_weights(plan, fingerprint) for name, plan in plans.items()}
    with console.status("loading the policy"):
        agent = make_agent(plan.config, device, fingerprint)
    assert isinstance(agent, PolicyAgent)  # there is no flag for a server
    plans = {name: check_same_policy(plan, agent) for name, plan in plans.items()}
    looking = _looking(config, agent, blanks=not {*conditions} <= {UNBLANKED, "hidden"})
    return {name: _asking(plan, looking, name) for name, plan in plans.items()}, agent


def _in_own_folder(plan: Plan, flags: EvaluationConfig) -> Plan:
    """The plan of another condition, which differs in where its results go."""
    return replace(plan, config=flags, output_dir=Path(str(flags.output_dir)))


def _looking(config: LooksConfig, agent: PolicyAgent, blanks: bool) -> Looking:
    """Raises ValueError where patches or blanking mean nothing for this policy."""
    model, cameras = agent.policy.model, tuple(agent.cameras)
    grid = math.isqrt(model.num_visual_tokens // len(cameras))
    if grid * grid * len(cameras) != model.num_visual_tokens:
        raise ValueError(
            f"the policy has {model.num_visual_tokens} visual tokens of {counted(len(cameras), 'picture')}, which are "
            "no square grids of patches"
        )
    if config.env_img_res < 2 * grid:
        raise ValueError(f"--env_img_res {config.env_img_res}: expected at least {2 * grid}, two pixels a patch")
    reason = why_not(model)
    if agent.policy.action_head.kind == AUTOREGRESSIVE:
        reason = "the policy decodes one token after another, over all visual tokens"
    if blanks and reason is not None:
        raise ValueError(f"--blank {config.blank}: {reason}, or give --blank hidden or none")
    return Looking(cameras, grid, agent.center_crop)


def _asking(plan: Plan, looking: Looking, condition: str) -> Plan:
    """The plan of a condition, whose results say what is special about them."""
    if condition == UNBLANKED:
        return replace(plan, probes=replace(looking, pictured=PICTURED))
    warning = f"{TAKEN}{condition}: something was taken from the policy, so this is no plain result"
    return replace(plan, probes=replace(looking, blank=condition), warnings=[*plan.warnings, warning])


def _roll_out(plan: Plan, agent: PolicyAgent, command: list[str], console: Console, device: torch.device) -> Results:
    """One evaluation, gone on with where it was stopped."""
    console.print(f"rollouts, {plan.output_dir.name}:", highlight=False)
    alone = Ranks(0, 1, device)
    with Journal(plan.output_dir, 0, 1) as journal:
        return evaluate_with_progress(plan, agent, journal, command, console, alone, WandbLog(plan, active=False))


def _draw(found: Sequence[tuple[EpisodeRecord, Seen]], config: LooksConfig, agent: PolicyAgent) -> None:
    """A sheet and a video of each task."""
    fps = agent.robot.control_rate_hz / (config.num_open_loop_steps or agent.robot.open_loop_steps)
    for suite, task in dict.fromkeys((record.suite, record.task_index) for record, _ in found):
        own = [each for each in found if (each[0].suite, each[0].task_index) == (suite, task)]
        draw(own, agent.center_crop, fps, config.output_dir / picture_stem(suite, task))


def _made(config: LooksConfig, command: list[str], conditions: dict[str, Results]) -> dict[str, Any]:
    """Of the rollouts, which may be older than the report."""
    results = conditions[UNBLANKED]
    warnings = [line for each in conditions.values() for line in each.run["warnings"] if not line.startswith(TAKEN)]
    return {
        "command": command,
        "conditions": {
            name: {"started": each.run["started"], "git_commit": each.run["git_commit"]}
            for name, each in conditions.items()
        },
        "checkpoint": results.policy["checkpoint"],
        "weights_fingerprint": results.policy.get("weights_fingerprint"),
        "policy": results.run["policy"],
        "pruner": results.policy["pruner"],
        "engine": results.policy["engine"],
        "device": results.run["device"],
        "versions": results.versions,
        "flags": {name: None if value is None else str(value) for name, value in vars(config).items()},
        "warnings": list(dict.fromkeys(warnings)),
    }


def command(config: LooksConfig) -> int:
    """What the command line runs; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = GoesOn(stderr=False)
    handlers = [RichHandler(console=console, show_path=False)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    transformers.utils.logging.disable_progress_bar()
    return main(config, sys.argv, console)
