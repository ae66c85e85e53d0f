"""Success and tokens against training steps: what was measured of an arm's checkpoints, made of kept results alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from matplotlib.ticker import FuncFormatter

from experiments.robot.libero.comparison.compare import span
from lightvla.study.definition import Arm, Scene, Study
from lightvla.study.records import ArmResult, Rollout
from lightvla.study.telling.figures import success_rate
from lightvla.study.variants import variants
from prismatic.clustered_trials import Cluster, clustered_bootstrap
from prismatic.report.charts import WIDTH
from prismatic.report.data import Cell, Row, Section, Table, share_cell
from prismatic.report.figures import COLOURS, INK, add_legend_above, chart_axes, legend_shape, to_svg
from prismatic.significance import Interval

_APART = 0.01
"""Of the last step: how far arms are drawn beside each other, so that their intervals do not hide one another."""


@dataclass(frozen=True)
class Measured:
    """One arm behind so many steps, over its training seeds.

    Attributes:
        successes, trials: of rollouts.
        rate, tokens: success rate, and tokens kept per query, averaged over tasks; each with its 95 % interval over
            initial states.
    """

    step: int
    successes: int
    trials: int
    rate: tuple[float, Interval]
    tokens: tuple[float, Interval]


def measured_steps(arm: Arm, last: int, results: Sequence[ArmResult], beside: Sequence[ArmResult]) -> list[Measured]:
    """One scene's arm step by step, the last one by the arm's own result on the starts and seeds of the others.

    Args:
        last: how many steps the arm was trained for.
        results, beside: of the arm, and of its checkpoints.
    """
    steps = {f"step{step}": step for step in arm.checkpoints}
    beside = [result for result in beside if result.arm == arm.name and result.variant in steps]
    starts = {(result.seed, rollout.key) for result in beside for rollout in result.rollouts}
    rollouts: dict[int, list[Rollout]] = {}
    for result in beside:
        rollouts.setdefault(steps[result.variant], []).extend(result.rollouts)
    for result in results:
        if result.arm == arm.name:
            own = [rollout for rollout in result.rollouts if (result.seed, rollout.key) in starts]
            rollouts.setdefault(last, []).extend(own)
    return [
        Measured(step, sum(rollout.success for rollout in own), len(own), success_rate(own), _tokens(own))
        for step, own in sorted(rollouts.items())
        if own
    ]


def _tokens(rollouts: Iterable[Rollout]) -> tuple[float, Interval]:
    """Per query, averaged over tasks; all rollouts from one initial state are drawn together."""
    found: dict[int, dict[int, Cluster]] = {}
    for rollout in rollouts:
        states = found.setdefault(rollout.task, {})
        kept, queries = states.get(rollout.state, (0.0, 0))
        states[rollout.state] = kept + rollout.tokens * rollout.queries, queries + rollout.queries
    return clustered_bootstrap([list(states.values()) for states in found.values()])


def checkpoint_sections(
    study: Study, scene: Scene, results: Sequence[ArmResult], beside: Sequence[ArmResult]
) -> list[Section]:
    """One section for a scene whose arms' checkpoints were measured, else none."""
    last = study.training.arm_steps
    found = {arm.name: measured_steps(arm, last, results, beside) for arm in study.arms if arm.checkpoints}
    found = {name: points for name, points in found.items() if points}
    if not found:
        return []
    title = f": {scene.name}" if len(study.scenes) > 1 else ""
    success = {name: [(each.step, *each.rate) for each in points] for name, points in found.items()}
    tokens = {name: [(each.step, *each.tokens) for each in points] for name, points in found.items()}
    charts = [StepChart("Success", "success rate", success, 1.0), StepChart("Tokens", "tokens kept per query", tokens)]
    note = (
        "Checkpoints on the way and the last, on the first starts of a task alone; no part of any comparison. Before "
        "the last step the learning rate has not come down yet, and what a checkpoint solves is not what a training of "
        "so many steps would. Intervals: 95 % over initial states, with all their rollouts; tokens are averaged over "
        "tasks."
    )
    return [Section(f"Success and tokens against training steps{title}", [*charts, _table(found)], note=note)]


def _table(found: Mapping[str, Sequence[Measured]]) -> Table:
    rows: list[Row] = [
        (
            f"{name}, step {each.step}",
            share_cell(each.successes, each.trials),
            Cell(f"{100 * each.rate[0]:.1f} ({span(each.rate[1])})", sort=each.rate[0]),
            Cell(f"{each.tokens[0]:.1f} ({each.tokens[1].low:.1f} to {each.tokens[1].high:.1f})", sort=each.tokens[0]),
        )
        for name, points in found.items()
        for each in points
    ]
    return Table("Checkpoints", ("arm, step", "solved", "% by initial states", "tokens kept"), rows)


def checkpoints_text(study: Study, scene: Scene) -> list[str]:
    """`lightvla behind 400, 800 steps, 20 rollouts a task`, for the table of what was fixed."""
    found = []
    for arm in study.arms:
        chosen = [variant for variant in variants(scene, arm) if variant.step is not None]
        if chosen:
            steps = ", ".join(str(variant.step) for variant in chosen)
            found.append(f"{arm.name} behind {steps} steps, {chosen[0].trials} rollouts a task")
    return found


@dataclass(frozen=True)
class StepChart:
    """A value over training steps, with its 95 % interval as a line through each point.

    Args:
        unit: label of the y axis.
        series: legend label -> step, value and interval.
        most: where the y axis ends, which is then in percent; None: above the highest interval.
    """

    kind: ClassVar[str] = "chart"
    wide: ClassVar[bool] = True
    title: str
    unit: str
    series: Mapping[str, Sequence[tuple[int, float, Interval]]]
    most: float | None = None

    @property
    def description(self) -> str:
        parts = [
            f"{label}: " + ", ".join(f"{value:.3g} at step {step}" for step, value, _ in points)
            for label, points in self.series.items()
        ]
        return f"{self.title} over training steps. {'; '.join(parts)}"

    def table(self) -> Table | None:
        """None: the table of the section has all figures."""
        return None

    def svg(self) -> str | None:
        """The chart; None without any point."""
        if not any(self.series.values()):
            return None
        columns, height = legend_shape(list(self.series))
        with chart_axes(WIDTH, 2.8 + height) as axes:
            drawn, last = {}, max(step for own in self.series.values() for step, _, _ in own)
            for number, (label, points) in enumerate(self.series.items()):
                colour = COLOURS[number % len(COLOURS)]
                steps, values = np.array([point[:2] for point in points]).T
                steps = steps + last * _APART * (number - (len(self.series) - 1) / 2)
                low, high = np.array([point[2] for point in points]).T
                axes.vlines(steps, low, high, color=colour, alpha=0.45, linewidth=3)
                drawn[label] = axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=4)[0]
            axes.set_ylim(0, self.most or 1.05 * max(p[2].high for own in self.series.values() for p in own))
            if self.most is not None:
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
            axes.set_xlim(left=0)
            axes.set_xticks([0, *sorted({step for own in self.series.values() for step, _, _ in own})])
            axes.set_xlabel("training step", color=INK)
            axes.set_ylabel(self.unit, color=INK)
            if columns:
                add_legend_above(axes, columns, drawn)
            return to_svg(axes, self.description)
