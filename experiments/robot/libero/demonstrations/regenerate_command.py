"""Play LIBERO's HDF5 demonstrations again in the simulator, and write those that succeed as an RLDS dataset.

    lightvla regenerate --libero_task_suite libero_goal --libero_raw_data_dir LIBERO/libero/datasets

All files are read and checked first. An interrupted regeneration continues where it stopped when the same command is
run again. Ends with 0 when the dataset is there, 2 when something cannot be used or no demonstration succeeded, 130
when it was interrupted.
"""

from __future__ import annotations

import signal
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.robot.libero.demonstrations.config import RegenerationConfig
from experiments.robot.libero.demonstrations.regenerate import (
    Outcome,
    TaskReplays,
    finished,
    plan,
    regenerate,
    write,
)
from experiments.robot.libero.simulator.backend import RenderingUnavailable
from experiments.robot.libero.simulator.tasks import LiberoTask
from prismatic.command_status import STOPPED, UNUSABLE, print_error

_REFUSALS = (ValueError, OSError, ImportError, RuntimeError, RenderingUnavailable)


def main(config: RegenerationConfig, console: Console) -> int:
    """Check, replay, write, say what is left out; returns the exit status."""
    try:
        with console.status("reading the demonstrations"):
            replays = plan(config)
        summaries = finished(config, replays)
        if summaries is None:
            summaries = _regenerate_with_progress(config, replays, console)
    except _REFUSALS as error:
        print_error(error)
        return UNUSABLE
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to continue")
        return STOPPED
    console.print(_table(summaries))
    console.print(f"dataset: {config.dataset_dir}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _regenerate_with_progress(
    config: RegenerationConfig, replays: list[TaskReplays], console: Console
) -> list[dict[str, Any]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left_out]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    left_out = 0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("replays", total=sum(len(one.demonstrations) for one in replays), left_out="")

        def on_outcome(task: LiberoTask, outcome: Outcome) -> None:
            nonlocal left_out
            left_out += outcome.reason is not None
            progress.update(
                bar,
                advance=1,
                description=f"{task.suite} {task.index}",
                left_out=f"{left_out} left out" if left_out else "",
            )

        regenerate(config, replays, on_outcome)
    with console.status("writing the dataset"):
        write(config, replays)
    return [one.summary() for one in replays]


def _table(summaries: list[dict[str, Any]]) -> Table:
    table = Table(title="demonstrations", title_justify="left")
    for heading in ("suite", "task", "instruction", "kept", "steps", "no-ops", "left out"):
        table.add_column(heading, justify="left" if heading in ("suite", "instruction", "left out") else "right")
    for summary in summaries:
        left_out = ", ".join(summary["left_out"]) or "none"
        reasons = "; ".join(f"{reason} ({count}x)" for reason, count in summary["reasons"].items())
        table.add_row(
            summary["suite"],
            str(summary["task"]),
            summary["language"],
            f"{summary['kept']}/{summary['demonstrations']}",
            str(summary["steps"]),
            str(summary["dropped_steps"]),
            f"{left_out}: {reasons}" if reasons else left_out,
        )
    return table


def command(config: RegenerationConfig) -> int:
    """What the command line runs; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop jobs so
    return main(config, Console())
