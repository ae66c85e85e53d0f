"""A plan as people read it: a table in a terminal, a few lines elsewhere."""

import logging
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from rich import get_console
from rich.table import Table

from prismatic.training.config import FinetuneConfig
from prismatic.training.data import TrainingData
from prismatic.training.distributed import Ranks
from prismatic.training.planning.disk import gigabytes
from prismatic.training.planning.memory import StepCost
from prismatic.training.planning.plan import MemoryPlan, Plan, make_plan
from prismatic.training.runs.computing import Computing

log = logging.getLogger(__name__)

Row = tuple[str, str]

_LEAST_BYTES = 50_000
"""Less is a part of 0.0 MB, and not told."""
_LEAST_STEP_S = 0.005
"""A shorter step takes longer to start than to compute, so that its arithmetic says nothing."""


def tell_plan(
    config: FinetuneConfig, ranks: Ranks, folder: Path, data: TrainingData, done: int, computing: Computing
) -> None:
    """The main process makes the plan, shows it and warns of what it finds; all processes call it.

    Raises ValueError where the disk is too small, and as `make_plan`.
    """
    with ranks.together(ValueError, OSError):
        if ranks.is_main:
            plan = make_plan(config, ranks, folder, data, done, computing)
            show(plan)
            for words in plan.warnings():
                log.warning("%s", words)
            plan.disk.check()


def show(plan: Plan) -> None:
    """Print the table, or log a line for each of its groups."""
    console = get_console()
    if not console.is_terminal:
        for group, rows in groups(plan):
            log.info("%s: %s", group, "; ".join(f"{name} {value}".strip() for name, value in rows))
        return
    table = Table(show_header=False, title="plan", title_justify="left")
    for group, rows in groups(plan):
        table.add_section()
        for number, (name, value) in enumerate(rows):
            table.add_row(group if number == 0 else "", name, value)
    console.print(table)


def groups(plan: Plan) -> Iterator[tuple[str, list[Row]]]:
    """The plan's rows, by what they are about."""
    config, counts = plan.config, plan.counts
    steps = f"{plan.steps_left}" + (f", {plan.done} done" if plan.done else "")
    per_step = f"{plan.processes} processes x batch {config.batch_size} x {config.grad_accumulation_steps} micro-steps"
    epochs = plan.steps_left * plan.samples_per_step / counts.epoch
    data = [("samples", f"{counts.train}"), ("epochs to do", f"{epochs:.1f} of {counts.epoch} samples")]
    if counts.held_out is not None:
        data.append(("held out", f"{counts.held_out}"))
    yield "steps", [("to do", steps), ("samples of a step", f"{plan.samples_per_step} ({per_step})")]
    yield "data", data
    yield "parameters", [("trained", _parts(plan.trained)), ("frozen", _parts(plan.frozen))]
    yield ("memory of a card" if plan.memory.on_gpu else "memory of a process"), list(memory_rows(plan.memory))
    disk = plan.disk
    yield (
        "saving",
        [
            ("a checkpoint", gigabytes(disk.checkpoint)),
            ("to write", f"{disk.written}, at most {disk.stored} at once: {gigabytes(disk.needed)}"),
            ("free", f"{gigabytes(disk.free)} in {disk.folder}"),
            ("host memory", f"up to {gigabytes(plan.saving)} more meanwhile"),
        ],
    )
    if (seconds := plan.seconds_per_step) is not None and seconds >= _LEAST_STEP_S:
        whole = timedelta(seconds=round(seconds * plan.steps_left))
        rate = "by the rate of matrix products here; the progress bar tells the real one"
        yield "time, at best", [("a step", f"{seconds:.3g} s ({rate})"), ("all", f"{whole}")]


def memory_rows(memory: MemoryPlan) -> Iterator[Row]:
    """The parts of a process's memory, at the moment when it is fullest; those of 0.0 MB are left out."""
    cost = memory.costs.get(memory.kept)
    lasting = {
        "this process": memory.process, "frozen weights": memory.frozen, "trained weights": memory.trained,
        "optimizer": memory.optimizer, "average of weights": memory.average,
    }  # fmt: skip
    for name, size in lasting.items():
        if size >= _LEAST_BYTES:
            yield name, gigabytes(size)
    if memory.gathered >= _LEAST_BYTES:
        yield (
            "gathered",
            f"{gigabytes(memory.gathered)} (the largest block twice, and what is in none; the rest: shares)",
        )
    if memory.gradients_stay and memory.gradients >= _LEAST_BYTES:
        where = "" if memory.gathered else " (kept between micro-steps, or in buckets for exchange)"
        yield "gradients", f"{gigabytes(memory.gradients)}{where}"
    if cost is None:
        yield "gradients", gigabytes(memory.gradients)
        yield "activations", "not known"
        return
    yield from _step_rows(memory, cost)
    label = f"{memory.kept} of {memory.num_visual} visual tokens ({memory.kept_because})"
    yield "together", f"{gigabytes(memory.peak())} with {label}"
    if memory.kept != memory.num_visual:
        yield "", f"{gigabytes(memory.peak(memory.num_visual))} with all {memory.num_visual}"
    if memory.free is not None:
        yield "free", gigabytes(memory.free)


def _step_rows(memory: MemoryPlan, cost: StepCost) -> Iterator[Row]:
    if not memory.gradients_stay and memory.gradients > cost.peak:
        yield "gradients", f"{gigabytes(memory.gradients)} (more than a pass takes meanwhile: {gigabytes(cost.peak)})"
        return
    if not memory.gradients_stay and cost.new_gradients >= _LEAST_BYTES:
        yield "gradients", f"{gigabytes(cost.new_gradients)} (in the end {gigabytes(memory.gradients)})"
    passing = {
        "activations: vision": cost.vision,
        "activations: rest": cost.activations - cost.vision,
        "temporary": cost.peak - cost.activations - cost.new_gradients,
    }
    for name, size in passing.items():
        if size >= _LEAST_BYTES:
            yield name, gigabytes(size)


def _parts(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    by_part = ", ".join(f"{part} {_millions(number)}" for part, number in sorted(counts.items()))
    return f"{_millions(total)} ({by_part})" if counts else "none"


def _millions(number: int) -> str:
    return f"{number / 1e6:.4g} M"
