"""Work, memory and movement of a study's arms, by its kept results alone; the time of a query is the benchmark's."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lightvla.study.benchmarks import SceneBenchmark
from lightvla.study.definition import BASELINE
from lightvla.study.records import ArmResult
from prismatic.clustered_trials import Cluster, clustered_bootstrap
from prismatic.report.data import Cell, Row, Table
from prismatic.significance import Interval

FEWEST_STATES = 5
"""Of every task: below that the steps' interval, a bootstrap, would be too narrow, and none is given."""


@dataclass(frozen=True)
class Costs:
    """Of one arm in one scene, over all its training seeds; None where it was not recorded.

    Attributes:
        flops: of a policy query, mean over seeds.
        steps: mean difference in control steps to the baseline on starts that both solved, with its 95 % interval over
            initial states, and on how many starts; averaged over tasks. None for the baseline itself.
        jerk: RMS jerk in m/s^3 of the successful rollouts, mean.
        training_s: of one training, mean over seeds.
        memory_gb: the most that a training's process held.
    """

    arm: str
    flops: float | None
    steps: tuple[float, Interval, int] | None
    jerk: float | None
    training_s: float | None
    memory_gb: float | None


def costs(arm: str, results: Sequence[ArmResult], baseline: Sequence[ArmResult]) -> Costs:
    """Of the results of one arm in one scene, with the baseline's (none for the baseline itself)."""
    flops = [result.flops for result in results if result.flops is not None]
    jerks = [r.jerk for result in results for r in result.rollouts if r.success and r.jerk is not None]
    seconds = [result.training["seconds"] for result in results if "seconds" in result.training]
    memory = [result.training["host_peak_gb"] for result in results if "host_peak_gb" in result.training]
    return Costs(
        arm,
        fmean(flops) if flops else None,
        _more_steps(results, baseline),
        fmean(jerks) if jerks else None,
        fmean(seconds) if seconds else None,
        max(memory, default=None),
    )


def _more_steps(own: Sequence[ArmResult], baseline: Sequence[ArmResult]) -> tuple[float, Interval, int] | None:
    found: dict[int, dict[int, list[int]]] = {}
    for first in own:
        for second in (other for other in baseline if other.seed == first.seed):
            others = {rollout.key: rollout for rollout in second.rollouts if rollout.success}
            for rollout in first.rollouts:
                if rollout.success and rollout.key in others:
                    more = rollout.steps - others[rollout.key].steps
                    found.setdefault(rollout.task, {}).setdefault(rollout.state, []).append(more)
    if not found:
        return None
    tasks: list[list[Cluster]] = [
        [(float(sum(numbers)), len(numbers)) for numbers in states.values()] for states in found.values()
    ]
    mean, interval = clustered_bootstrap(tasks)
    if min(map(len, tasks)) < FEWEST_STATES:
        interval = Interval(mean, mean)
    return mean, interval, sum(count for clusters in tasks for _, count in clusters)


def cost_table(arms: Sequence[Costs]) -> Table:
    """Every arm beside the baseline."""
    base = next((each for each in arms if each.arm == BASELINE), None)
    rows: list[Row] = [
        (
            each.arm,
            _work(each.flops, base.flops if base else None),
            "–" if each.steps is None else _steps(*each.steps),
            "–" if each.jerk is None else Cell(f"{each.jerk:.1f}", sort=each.jerk),
            "–" if each.training_s is None else Cell(f"{each.training_s / 60:.1f} min", sort=each.training_s),
            "–" if each.memory_gb is None else Cell(f"{each.memory_gb:.2f} GB", sort=each.memory_gb),
        )
        for each in arms
    ]
    columns = (
        "arm", "work of a query", f"steps more than {BASELINE}", "jerk, m/s³", "training", "memory in training",
    )  # fmt: skip
    return Table("What it costs and how it moves", columns, rows, sortable=True)


def _work(flops: float | None, base: float | None) -> Cell | str:
    if flops is None:
        return "–"
    share = f" ({100 * flops / base:.0f} %)" if base else ""
    return Cell(f"{flops / 1e6:.3g} MFLOP{share}", sort=flops)


def _steps(mean: float, interval: Interval, count: int) -> Cell:
    low, high = interval
    # All alike, or too few: no interval, which would look like certainty.
    spread = f" ({low:+.1f} to {high:+.1f})" if low < high else ""
    return Cell(f"{mean:+.1f}{spread}", sort=mean, note=f"{count} starts")


def cost_note() -> str:
    """What the columns mean."""
    return (
        f"In brackets: of {BASELINE}'s. Work: floating-point operations at the mean number of tokens, by formula. "
        f"Steps: on starts that the arm and {BASELINE} both solved, with a 95 % interval over initial states where "
        f"each task has {FEWEST_STATES} or more. Jerk: root mean square of the gripper's, over successful rollouts. "
        "Training: the whole command, longer where the machine did other work; memory: the most that its process held, "
        "without those that read data."
    )


def benchmark_table(benchmark: SceneBenchmark) -> Table:
    """What pruners cost on the pruned arm's weights, with nothing beside them."""
    rows: list[Row] = []
    for row in benchmark.rows:
        fewest, most = row.tokens
        value, low, high = row.times_as_fast
        rows.append((
            row.pruner,
            Cell(str(most) if fewest == most else f"{fewest} to {most}", sort=most),
            Cell(f"{row.flops / 1e6:.1f} MFLOP", sort=row.flops),
            Cell(f"{row.ms:.1f} ms", sort=row.ms),
            Cell(f"{value:.2f} ({low:.2f} to {high:.2f})" if low < high else f"{value:.2f}", sort=value),
        ))  # fmt: skip
    note = (
        "With nothing else of the study beside it: one thread, float32, eager engine, the model's part of a query; "
        "median of calls in turns, and how many times as fast as without pruning. What a pruner reuses depends on the "
        f"pictures: rollouts have tokens and work of their own, told before. On {benchmark.machine['device']}."
    )
    columns = ("pruner", "tokens", "work of a query", "time of a query", "times as fast as all tokens")
    return Table("A query, by the benchmark", columns, rows, note, sortable=True)
