"""Collect demonstrations of LIBERO tasks with scripted experts and write them as an RLDS dataset.

    lightvla collect --task_suite_name libero_goal --task_ids 1,4,8 --num_demos_per_task 30

An interrupted collection continues where it stopped when the same command is run again. Ends with 0 when every task has
its demonstrations, 1 when some are missing, 2 when the flags cannot be used or nothing was solved, 130 when it was
interrupted.
"""

from __future__ import annotations

import signal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.robot.libero.demonstrations.collect import Outcome, collect, finished, plan, write
from experiments.robot.libero.demonstrations.config import CollectionConfig
from experiments.robot.libero.simulator.backend import RenderingUnavailable
from experiments.robot.libero.simulator.tasks import LiberoTask
from prismatic.command_status import STOPPED, UNUSABLE, UNWANTED, print_error
from prismatic.report.data import counted

_REFUSALS = (ValueError, OSError, ImportError, RuntimeError, RenderingUnavailable)


def main(config: CollectionConfig) -> int:
    """Collect, write, say what could not be solved; returns the exit status."""
    console = Console()
    try:
        tasks = plan(config)
        summaries = finished(config)
        if summaries is None:
            summaries = _collect_with_progress(config, tasks, console)
    except _REFUSALS as error:
        print_error(error)
        return UNUSABLE
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to continue")
        return STOPPED
    console.print(_table(summaries))
    console.print(f"dataset: {config.dataset_dir}", soft_wrap=True)
    complete = all(summary["demonstrations"] == summary["wanted"] for summary in summaries)
    return 0 if complete else UNWANTED


def _collect_with_progress(config: CollectionConfig, tasks: list[LiberoTask], console: Console) -> list[dict]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unsolved]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    unsolved = 0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("demonstrations", total=sum(config.demonstrations(len(tasks))), unsolved="")

        def on_outcome(task: LiberoTask, outcome: Outcome) -> None:
            nonlocal unsolved
            unsolved += outcome.file is None
            progress.update(
                bar,
                advance=outcome.file is not None,
                description=f"{task.suite} {task.index}",
                unsolved=f"{counted(unsolved, 'episode')} unsolved" if unsolved else "",
            )

        results = collect(config, tasks, on_outcome)
    with console.status("writing the dataset"):
        write(config, results)
    return [result.summary() for result in results]


def _table(summaries: list[dict]) -> Table:
    table = Table(title="demonstrations", title_justify="left")
    for heading in ("suite", "task", "instruction", "collected", "initial states that could not be solved"):
        table.add_column(heading, justify="right" if heading in ("task", "collected") else "left")
    for summary in summaries:
        missing = ", ".join(summary["unsolved"]) or "none"
        reasons = "; ".join(f"{reason} ({count}x)" for reason, count in summary["reasons"].items())
        table.add_row(
            summary["suite"],
            str(summary["task"]),
            summary["language"],
            f"{summary['demonstrations']}/{summary['wanted']}",
            f"{missing}: {reasons}" if reasons else missing,
        )
    return table


def command(config: CollectionConfig) -> int:
    """What the command line runs; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop jobs so
    return main(config)
