"""The evaluation as a command: check, load, roll out, report."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import transformers.utils.logging
from rich.console import Console
from rich.logging import RichHandler

from experiments.robot.libero.evaluation.conventions import version_warnings
from experiments.robot.libero.evaluation.plan import Plan, make_plan
from experiments.robot.libero.evaluation.resume import check_resumable, check_same_policy, check_same_weights
from experiments.robot.libero.evaluation.terminal import (
    GoesOn,
    cost_line,
    evaluate_with_progress,
    print_line,
    summary_table,
)
from experiments.robot.libero.evaluation.wandb_log import WandbLog
from experiments.robot.libero.policies.checkpoint import scaling_warnings
from experiments.robot.libero.policies.choice import make_agent, weights_of
from experiments.robot.libero.policies.contract import Agent
from experiments.robot.libero.policies.watched import PolicyLost
from experiments.robot.libero.results.journal import Journal
from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.results.results import FILE_NAME, Results
from experiments.robot.libero.rollouts.runner import is_full
from experiments.robot.libero.rollouts.worker_pool import SimulatorsUnusable
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.settings.suite_names import suites_of
from experiments.robot.libero.simulator.backend import RenderingUnavailable, draw_on_own_gpu
from prismatic.command_line import named_by_node, speaks_for_node
from prismatic.command_status import INVALID, STOPPED, UNUSABLE, noticing_ctrl_c, print_error, raise_swallowed_ctrl_c
from prismatic.training.distributed import ElsewhereError, Ranks, ranks, resolve_device
from prismatic.training.wandb_account import without_effect

LONGEST = timedelta(days=30)
"""How long a process that is done waits for the others."""


_REFUSALS = (ValueError, FileNotFoundError, ImportError, ConnectionError, RenderingUnavailable)


def main(config: EvaluationConfig, command: list[str]) -> int:
    """Check, load, roll out, report; returns the exit status: `UNUSABLE` also where an evaluation cannot go on."""
    console = GoesOn(stderr=False)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    transformers.utils.logging.disable_progress_bar()  # of loading weights; `prepared` shows that it goes on
    try:
        with noticing_ctrl_c(), _joined(config) as processes:
            return run(config, command, console, processes)
    except Refused as refused:
        if speaks_for_node():
            print_error(str(refused))
        return UNUSABLE
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print_line("stopped before the first rollout")
        return STOPPED


class Refused(Exception):
    """The flags or the checkpoint cannot be used; nothing long has been done yet."""

    def __init__(self, reason: Exception) -> None:
        # What another process found names its machine itself.
        super().__init__(str(reason) if isinstance(reason, ElsewhereError) else named_by_node(str(reason)))


@contextmanager
def _joined(config: EvaluationConfig) -> Iterator[Ranks]:
    """This process among those of torchrun; raises `Refused` for a device that is not there."""
    device = "cpu" if config.policy_url else config.device
    try:
        resolve_device(device)
    except ValueError as error:
        raise Refused(error) from error
    with ranks(device, save_timeout=LONGEST) as processes:
        yield processes


@contextmanager
def prepared(config: EvaluationConfig, processes: Ranks, console: Console) -> Iterator[tuple[Plan, Agent, Journal]]:
    """Do everything that can be refused, in all processes alike. Raises `Refused`."""
    with contextlib.ExitStack() as stack:
        try:
            with processes.together(*_REFUSALS):
                draw_on_own_gpu(processes.world_size)
                plan = check_resumable(make_plan(config))
            # A folder named by the time must be the same one for all processes.
            plan = replace(plan, output_dir=processes.gather(plan.output_dir)[0])
            with processes.together(ValueError, OSError):
                journal = stack.enter_context(Journal(plan.output_dir, processes.rank, processes.world_size))
            # One process reads them all, hence from the disk once.
            with processes.together(*_REFUSALS, OSError):
                fingerprint = weights_of(config) if processes.is_main else None
            fingerprint = processes.gather(fingerprint)[0]
            with processes.together(*_REFUSALS), console.status("loading the policy"):
                plan = check_same_weights(plan, fingerprint)
                agent = stack.enter_context(contextlib.closing(make_agent(config, processes.device, fingerprint)))
                plan = check_same_policy(plan, agent)
        except (*_REFUSALS, OSError, ElsewhereError) as error:
            raise Refused(error) from error
        yield plan, agent, journal


def run(config: EvaluationConfig, command: list[str], console: Console, processes: Ranks) -> int:
    """What one process of an evaluation does; the main one shows it."""
    shown = console if processes.is_main else Console(quiet=True)
    with prepared(config, processes, shown) as (plan, agent, journal):
        raise_swallowed_ctrl_c()
        return roll_out(plan, agent, journal, command, shown, processes)


def roll_out(plan: Plan, agent: Agent, journal: Journal, command: list[str], console: Console, processes: Ranks) -> int:
    """Evaluate what has been checked, and show what came out; returns the exit status."""
    described = agent.description()
    for assumption in described["assumptions"]:
        console.print(f"[yellow]assumed:[/] {assumption}")
    for line in without_effect(plan.config):
        console.print(f"[yellow]note:[/] {line}", soft_wrap=True)
    scaling = scaling_warnings(described, suites_of(plan.config.task_suite_name))
    for warning in [*version_warnings(collect_versions()), *plan.warnings, *scaling]:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    log = WandbLog(plan, active=processes.is_main)
    try:
        results = evaluate_with_progress(plan, agent, journal, command, console, processes, log)
        log.finish(results)
    except KeyboardInterrupt:
        console.print(f"stopped; {_go_on(plan)}", soft_wrap=True, markup=False)
        console.print(f"a report of what is done so far: lightvla report {plan.output_dir}", soft_wrap=True)
        return STOPPED
    except (PolicyLost, SimulatorsUnusable) as error:
        print_error(f"{error}; {_go_on(plan)}")
        return UNUSABLE
    except OSError as error:
        if not is_full(error):
            raise
        print_error(f"no space left to write into {plan.output_dir}: free some, then {_go_on(plan)}")
        return UNUSABLE
    finally:
        log.close()
    if processes.is_main:
        try:
            show(plan, results, console)
        except KeyboardInterrupt:
            console.print(f"stopped, but the results are complete: {plan.output_dir / FILE_NAME}", soft_wrap=True)
            console.print(f"the report: lightvla report {plan.output_dir}", soft_wrap=True)
            return STOPPED
    processes.barrier()  # torchrun ends all processes as soon as one of them ends with an error
    return INVALID if processes.is_main and results.summary()["all"]["invalid"] else 0


def _go_on(plan: Plan) -> str:
    return f"go on with the same command and --resume True --output_dir {plan.output_dir}"


def show(plan: Plan, results: Results, console: Console) -> None:
    """The outcome on the terminal, and the report."""
    console.print(summary_table(results))
    console.print(cost_line(results))
    if invalid := results.summary()["all"]["invalid"]:
        console.print(f"[bold red]{invalid} invalid rollouts[/] count neither way; --resume True tries them again")
    console.print(f"results: {plan.output_dir / FILE_NAME}", soft_wrap=True)
    if plan.config.report:
        console.print(report_line(plan.output_dir), soft_wrap=True, markup=False)


def report_line(folder: Path) -> str:
    """Write the report; returns where it is, or why there is none: no evaluation is lost over its report."""
    try:
        from experiments.robot.libero.reports.page import write_reports

        return f"report: {write_reports([folder])[0]}"
    except ImportError as error:
        return f"no report ({error}): pip install 'lightvla[report]', then lightvla report {folder}"
    except (OSError, ValueError) as error:
        return f"no report: {error}"


def command(config: EvaluationConfig) -> int:
    """What the command line runs; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop jobs so
    return main(config, sys.argv)
