"""What an evaluation shows on the terminal: progress, the table, the costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.robot.libero.evaluation.evaluate import Listeners, evaluate
from experiments.robot.libero.evaluation.plan import Plan
from experiments.robot.libero.policies.contract import Agent
from experiments.robot.libero.results.journal import Journal
from experiments.robot.libero.results.results import EpisodeRecord, Results, count_successes
from experiments.robot.libero.results.success import SuccessRow, success_rows
from prismatic.training.distributed import Ranks


def evaluate_with_progress(
    plan: Plan, agent: Agent, journal: Journal, command: list[str], console: Console, processes: Ranks
) -> Results:
    """`evaluate` under a progress bar that says how many rollouts succeeded."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[outcome]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    outcomes: list[bool | None] = []
    with Progress(*columns, console=console) as progress:
        title = "rollouts" if processes.world_size == 1 else f"rollouts of process 1 of {processes.world_size}"
        bar = progress.add_task(title, outcome="")

        def update() -> None:
            counts = count_successes(outcomes)
            progress.update(bar, completed=len(outcomes), outcome=f"{counts['successes']}/{counts['trials']} solved")

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

        return evaluate(plan, agent, command, Listeners(on_begin, on_episode), processes, journal)


def summary_table(results: Results) -> Table:
    """Success per task with 95 % interval, for the terminal."""
    rows = success_rows(results.episodes)
    table = Table()
    swapped = any(row.other_goal is not None for row in rows)
    headings = ["task", "solved", "95 % interval", *(["other task's goal"] if swapped else []), "invalid"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for row in rows:
        low, high = row.interval
        other = [row.other_goal_reached] if swapped else []
        table.add_row(row.name, row.solved, f"{low:.0%} to {high:.0%}", *other, str(row.invalid))
        if last_of_tasks(row, rows):
            table.add_section()
    return table


def last_of_tasks(row: SuccessRow, rows: Sequence[SuccessRow]) -> bool:
    """Whether a rule follows: behind the tasks of a suite where there are several, and before the sums."""
    following = rows[rows.index(row) + 1 :][:1]
    return row.is_task and any(not other.is_task or other.suite != row.suite for other in following)


def cost_line(results: Results) -> str:
    """Tokens kept and latency in one line."""
    summary = results.summary()
    kept, latency = summary["tokens_kept"], summary["latency_ms"]
    parts = []
    if kept:
        parts.append(f"tokens kept {kept['mean']:.1f} of {kept['of']} ({kept['min']} to {kept['max']})")
    if latency:
        parts.append(f"latency {latency['median']:.1f} ms median, {latency['p95']:.1f} ms p95")
    return "; ".join(parts)
