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
    summary = results.summary()
    table = Table()
    swapped = "other_goal" in summary["all"]
    headings = ["task", "solved", "95 % interval", *(["other task's goal"] if swapped else []), "invalid"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for row in [*summary["tasks"], {"task_name": "all", **summary["all"]}]:
        low, high = row["interval_95"]
        other = [f"{row['other_goal']['successes']}/{row['other_goal']['trials']}"] if swapped else []
        solved = f"{row['successes']}/{row['trials']}"
        table.add_row(
            row["task_name"].replace("_", " "), solved, f"{low:.0%} to {high:.0%}", *other, str(row["invalid"])
        )
    return table


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
