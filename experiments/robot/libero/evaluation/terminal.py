"""What an evaluation shows on the terminal, or writes where there is none: progress, the table, the costs, errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from experiments.robot.libero.evaluation.evaluate import Listeners, evaluate
from experiments.robot.libero.evaluation.plan import Plan
from experiments.robot.libero.evaluation.wandb_log import WandbLog
from experiments.robot.libero.policies.contract import Agent
from experiments.robot.libero.results.journal import Journal
from experiments.robot.libero.results.measures import (
    completion_text,
    jerk_text,
    latency_text,
    progress_text,
    waiting_text,
)
from experiments.robot.libero.results.results import EpisodeRecord, Results, count_successes
from experiments.robot.libero.results.success import SuccessRow, success_rows
from prismatic.command_status import raise_swallowed_ctrl_c
from prismatic.training.distributed import Ranks

_WIDE = 90
"""Columns of a terminal with room for bars beside names and numbers."""


class GoesOn(Console):
    """A console that falls silent when nobody reads it any more (`| head`): results are on the disk."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What Python would still write at its end goes nowhere, too.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def print_line(message: str) -> None:
    """One line on standard error, of something that is no error."""
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


def evaluate_with_progress(
    plan: Plan,
    agent: Agent,
    journal: Journal,
    command: list[str],
    console: Console,
    processes: Ranks,
    log: WandbLog,
) -> Results:
    """`evaluate` under a progress bar that says how many rollouts succeeded; without a terminal, a line per rollout."""
    outcomes: list[bool | None] = []
    with _progress(console) as progress:
        title = "rollouts" if processes.world_size == 1 else f"rollouts of process 1 of {processes.world_size}"
        bar = progress.add_task(title, outcome="")

        def update() -> None:
            progress.update(bar, completed=len(outcomes), outcome=_solved(outcomes))

        def on_begin(total: int, done: Sequence[EpisodeRecord]) -> None:
            progress.update(bar, total=total)
            if plan.config.resume:
                found = f"{len(done)} of {total} rollouts are done already" if done else "nothing is done there yet"
                console.print(f"--resume: {found}", highlight=False)
            outcomes.extend(record.success for record in done)
            update()

        def on_episode(record: EpisodeRecord) -> None:
            outcomes.append(record.success)
            update()
            log.episode(record)
            if not console.is_terminal:
                total = progress.tasks[bar].total or 0
                line = episode_line(record, outcomes, round(total))
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            raise_swallowed_ctrl_c()

        return evaluate(plan, agent, command, Listeners(on_begin, on_episode), processes, journal)


def _progress(console: Console) -> Progress:
    """A line that fits: on a narrow terminal numbers stay, and bar and clocks go."""
    numbers: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn("{task.fields[outcome]}")]
    if console.width >= _WIDE:
        title: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        columns = [*title, *numbers, TimeElapsedColumn(), TimeRemainingColumn()]
    else:
        columns = [*numbers, TimeRemainingColumn()]
    return Progress(*columns, console=console, disable=not console.is_terminal)


def episode_line(record: EpisodeRecord, outcomes: Sequence[bool | None], total: int) -> str:
    """How a rollout ended and the rate so far, as a line of a log."""
    ended = {True: "success", False: "failure", None: "invalid"}[record.success]
    where = f"{record.suite} task {record.task_index} initial state {record.initial_state}"
    return f"[{len(outcomes)}/{total}] {where}: {ended}, {record.steps} steps; {_solved(outcomes)}"


def _solved(outcomes: Sequence[bool | None]) -> str:
    counts = count_successes(outcomes)
    rate = "" if counts["rate"] is None else f" ({counts['rate']:.0%})"
    return f"{counts['successes']}/{counts['trials']} solved{rate}"


def summary_table(results: Results) -> Table:
    """Success per task with 95 % interval, for the terminal. Where it is narrow, names are cropped, and no number."""
    rows = success_rows(results.episodes)
    table = Table()
    swapped = any(row.other_goal is not None for row in rows)
    table.add_column("task")
    # Headings of two lines: a column is hardly wider than its numbers.
    for heading in ["solved", "95 %\ninterval", *(["other\ngoal"] if swapped else []), "invalid"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.interval
        name = Text(row.name, no_wrap=True, overflow="ellipsis")
        other = [row.other_goal_reached] if swapped else []
        table.add_row(name, row.solved, f"{low:.0%} to {high:.0%}", *other, str(row.invalid))
        if last_of_tasks(row, rows):
            table.add_section()
    return table


def last_of_tasks(row: SuccessRow, rows: Sequence[SuccessRow]) -> bool:
    """Whether a rule follows: behind the tasks of a suite where there are several, and before the sums."""
    following = rows[rows.index(row) + 1 :][:1]
    return row.is_task and any(not other.is_task or other.suite != row.suite for other in following)


def cost_line(results: Results) -> str:
    """Tokens kept, latency, and what a success takes, in one line."""
    summary = results.summary()
    kept, latency = summary["tokens_kept"], summary["latency_ms"]
    parts = []
    if kept:
        parts.append(f"tokens kept {kept['mean']:.1f} of {kept['of']} ({kept['min']} to {kept['max']})")
    if latency:
        waiting = "" if latency["includes_waiting"] else f", waiting {waiting_text(latency)} more"
        parts.append(f"latency {latency_text(latency)} median, {latency['p95']:.1f} ms p95{waiting}")
    numbers = summary["all"]
    if numbers["successes"]:
        parts.append(f"steps to success {completion_text(numbers)}")
    if numbers["mean_jerk"] is not None:
        parts.append(f"jerk {jerk_text(numbers)} m/s³")
    if numbers["mean_progress"] is not None:
        parts.append(f"progress {progress_text(numbers)}")
    return "; ".join(parts)
