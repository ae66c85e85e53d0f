"""Evaluate a policy in the LIBERO simulator.

    python experiments/robot/libero/run_libero_eval.py --pretrained_checkpoint CHECKPOINT --task_suite_name libero_goal

Writes `results.json`, and videos where asked for, into one folder. Ends with 0 when every rollout counts, 3 when some
are invalid (an error inside the rollout; the tracebacks are in the results), 2 when the flags or the checkpoint cannot
be used.
"""

from __future__ import annotations

import logging
import sys

import draccus
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.robot.libero.agents import Agent, PolicyAgent
from experiments.robot.libero.config import EvaluationConfig
from experiments.robot.libero.evaluation import Plan, evaluate, load_policy, make_plan
from experiments.robot.libero.protocols import version_warnings
from experiments.robot.libero.results import FILE_NAME, EpisodeRecord, Results, collect_versions, count_successes
from experiments.robot.libero.simulator import RenderingUnavailable

UNUSABLE, INVALID = 2, 3
"""Exit statuses."""

_REFUSALS = (ValueError, FileNotFoundError, ImportError, RenderingUnavailable)


def main(config: EvaluationConfig, command: list[str]) -> int:
    """Check, load, roll out, report; returns the exit status."""
    console = Console(stderr=False)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        plan = make_plan(config)
        with console.status("loading the policy"):
            agent = PolicyAgent(load_policy(config))
    except _REFUSALS as error:
        console.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        console.print(str(error), markup=False, highlight=False)
        return UNUSABLE
    for assumption in agent.description()["assumptions"]:
        console.print(f"[yellow]assumed:[/] {assumption}")
    for warning in version_warnings(collect_versions()):
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    results = evaluate_with_progress(plan, agent, command, console)
    console.print(summary_table(results))
    console.print(cost_line(results))
    console.print(f"results: {plan.output_dir / FILE_NAME}", soft_wrap=True)
    if config.use_wandb:
        log_to_wandb(plan, results)
    return INVALID if results.summary()["all"]["invalid"] else 0


def log_to_wandb(plan: Plan, results: Results) -> None:
    """Send the rates and costs to Weights & Biases."""
    import wandb

    config, summary = plan.config, results.summary()
    run = wandb.init(entity=config.wandb_entity, project=config.wandb_project, name=plan.output_dir.name)
    run.log({f"success_rate/{row['task_name']}": row["rate"] for row in summary["tasks"]})
    run.log({"success_rate/all": summary["all"]["rate"], "tokens_kept": (summary["tokens_kept"] or {}).get("mean")})
    run.finish()


def evaluate_with_progress(plan: Plan, agent: Agent, command: list[str], console: Console) -> Results:
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
        bar = progress.add_task("rollouts", total=sum(map(len, plan.starts)), outcome="")

        def on_episode(record: EpisodeRecord) -> None:
            outcomes.append(record.success)
            counts = count_successes(outcomes)
            progress.update(bar, advance=1, outcome=f"{counts['successes']}/{counts['trials']} solved")

        return evaluate(plan, agent, command, on_episode)


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


if __name__ == "__main__":
    sys.exit(main(draccus.parse(config_class=EvaluationConfig), sys.argv))
