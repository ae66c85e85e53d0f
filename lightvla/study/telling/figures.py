"""The numbers of a study, made of its kept results alone: rates, differences to the baseline, verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

from experiments.robot.libero.comparison.compare import ALPHA, p_equation, points, span
from lightvla.study.definition import BASELINE, Fixed, Study
from lightvla.study.records import ArmResult, Rollout
from prismatic.clustered_trials import clustered_difference, clustered_rate
from prismatic.report.data import counted
from prismatic.significance import (
    Interval,
    PairedCounts,
    holm,
    repeated_mcnemar,
    wilson_interval,
)

Trial = TypeVar("Trial")
Place = tuple[int, int]
"""A cluster: a task and one of its initial states. All its rounds and all training seeds belong to it."""


@dataclass(frozen=True)
class Difference:
    """An arm against the baseline on the same starts, training seed by training seed.

    Attributes:
        counts: of rollouts: both solved, the arm alone, the baseline alone, neither.
        value: success rate of the arm less the baseline's, averaged over tasks, in [-1, 1].
        interval: 95 %, over initial states (`clustered_difference`).
        p_value: of McNemar's test by initial states (`repeated_mcnemar`).
        corrected_p: Holm's, over all arms that the definition compares with this baseline in the scene.
        states: initial states that both were tried from.
    """

    counts: PairedCounts
    value: float
    interval: Interval
    p_value: float
    states: int
    corrected_p: float = 1.0

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `not distinguishable`, by the corrected p at 0.05."""
        if self.corrected_p >= ALPHA or not self.value:
            return "not distinguishable"
        return "better" if self.value > 0 else "worse"


@dataclass(frozen=True)
class ArmFigures:
    """What came out for one arm in one scene, over all its training seeds.

    Attributes:
        successes, trials: of rollouts; `wilson` is their interval as if each were a trial of its own.
        rate, clustered: success rate averaged over tasks, and its 95 % interval over initial states.
        by_task, by_seed: (successes, trials) by task index, and by training seed.
        tokens: kept per query, mean.
        steps: control steps of the successful rollouts, mean; None without any.
        difference: to the arm `none`; None for that arm itself, and where nothing pairs.
    """

    scene: str
    arm: str
    kind: str
    pruner: str
    successes: int
    trials: int
    wilson: Interval
    rate: float
    clustered: Interval
    by_task: Mapping[int, tuple[int, int]]
    by_seed: Mapping[int, tuple[int, int]]
    tokens: float
    of_tokens: int
    steps: float | None
    difference: Difference | None

    @property
    def token_share(self) -> float:
        return self.tokens / self.of_tokens


@dataclass(frozen=True)
class Primary:
    """The answer to what was fixed in advance, in one scene.

    Attributes:
        answer: `non-inferior`, `inferior` (the whole interval below the margin) or `not shown`.
        sentence: the same with its numbers.
    """

    scene: str
    answer: str
    sentence: str


def arm_figures(study: Study, results: Sequence[ArmResult]) -> list[ArmFigures]:
    """Scene by scene, in the order of the definition; arms without a result are left out."""
    found = []
    for scene in study.scenes:
        by_arm = {arm.name: [r for r in results if (r.scene, r.arm) == (scene.name, arm.name)] for arm in study.arms}
        figures = [
            figures_of(arm.name, arm.kind, own, by_arm[BASELINE] if BASELINE in by_arm and arm.name != BASELINE else [])
            for arm in study.arms
            if (own := by_arm[arm.name])
        ]
        found += _corrected(figures, planned=sum(arm.name != BASELINE for arm in study.arms))
    return found


def _corrected(figures: Sequence[ArmFigures], planned: int) -> list[ArmFigures]:
    """With Holm's p-values over the planned comparisons of a scene: those without a result yet count as p = 1."""
    compared = [each.difference.p_value for each in figures if each.difference is not None]
    corrected = iter(holm([*compared, *[1.0] * (planned - len(compared))]))
    return [
        each
        if each.difference is None
        else replace(each, difference=replace(each.difference, corrected_p=next(corrected)))
        for each in figures
    ]


def figures_of(arm: str, kind: str, own: Sequence[ArmResult], baseline: Sequence[ArmResult]) -> ArmFigures:
    """Of the results of one arm in one scene; without a difference where there are no results of the baseline."""
    rollouts = [rollout for result in own for rollout in result.rollouts]
    tasks = sorted({rollout.task for rollout in rollouts})
    successes, trials = _count(rollouts)
    rate, clustered = success_rate(rollouts)
    queries = sum(rollout.queries for rollout in rollouts)
    steps = [rollout.steps for rollout in rollouts if rollout.success]
    return ArmFigures(
        scene=own[0].scene,
        arm=arm,
        kind=kind,
        pruner=" / ".join(dict.fromkeys(result.pruner for result in own)),
        successes=successes,
        trials=trials,
        wilson=wilson_interval(successes, trials),
        rate=rate,
        clustered=clustered,
        by_task={task: _count([r for r in rollouts if r.task == task]) for task in tasks},
        by_seed={result.seed: _count(result.rollouts) for result in own},
        tokens=sum(rollout.tokens * rollout.queries for rollout in rollouts) / queries,
        of_tokens=own[0].num_visual_tokens,
        steps=sum(steps) / len(steps) if steps else None,
        difference=difference_of(own, baseline) if baseline else None,
    )


def _count(rollouts: Sequence[Rollout]) -> tuple[int, int]:
    return sum(rollout.success for rollout in rollouts), len(rollouts)


def success_rate(rollouts: Sequence[Rollout]) -> tuple[float, Interval]:
    """The mean over tasks, and its interval over initial states."""
    outcomes: dict[Place, list[bool]] = {}
    for rollout in rollouts:
        outcomes.setdefault((rollout.task, rollout.state), []).append(rollout.success)
    return clustered_rate(_by_task(outcomes))


def _by_task(clusters: Mapping[Place, list[Trial]]) -> list[list[list[Trial]]]:
    tasks: dict[int, list[list[Trial]]] = {}
    for (task, _), cluster in sorted(clusters.items(), key=lambda item: item[0]):
        tasks.setdefault(task, []).append(cluster)
    return list(tasks.values())


def difference_of(first: Sequence[ArmResult], second: Sequence[ArmResult]) -> Difference | None:
    """Two arms on the starts that both have, seed by seed; None without any.

    Results of different definitions share no starts.
    """
    pairs: dict[Place, list[tuple[bool, bool]]] = {}
    for own in first:
        for other in second:
            if (own.seed, own.study_sha256) != (other.seed, other.study_sha256):
                continue
            outcomes = {rollout.key: rollout.success for rollout in other.rollouts}
            for rollout in own.rollouts:
                if rollout.key in outcomes:
                    pair = (rollout.success, outcomes[rollout.key])
                    pairs.setdefault((rollout.task, rollout.state), []).append(pair)
    if not pairs:
        return None
    gains = {place: sum(a - b for a, b in outcomes) for place, outcomes in pairs.items()}
    value, interval = clustered_difference(_by_task(pairs))
    return Difference(
        counts=PairedCounts.of([pair] for outcomes in pairs.values() for pair in outcomes),
        value=value,
        interval=interval,
        p_value=repeated_mcnemar(Fraction(gain, len(pairs[place])) for place, gain in gains.items()),
        states=len(pairs),
    )


def primary_answers(study: Study, results: Sequence[ArmResult]) -> list[Primary]:
    """Scene by scene; `not shown` where the two arms share nothing yet."""
    return [_answer(study.fixed, scene.name, [r for r in results if r.scene == scene.name]) for scene in study.scenes]


def _answer(fixed: Fixed, scene: str, results: Sequence[ArmResult]) -> Primary:
    first, second = fixed.primary
    margin = fixed.margin_points
    sides = [[r for r in results if r.arm == name] for name in fixed.primary]
    difference = difference_of(*sides)
    if difference is None:
        return Primary(scene, "not shown", f"In {scene}, {first} and {second} have not both been run.")
    low, high = difference.interval
    queries = [(rollout.tokens, rollout.queries) for result in sides[0] for rollout in result.rollouts]
    tokens = sum(kept * count for kept, count in queries) / sum(count for _, count in queries)
    tokens /= sides[0][0].num_visual_tokens
    numbers = (
        f"{points(difference.value)} points, 95 % interval {span(difference.interval, signed=True)} over "
        f"{counted(difference.states, 'initial state')}, {p_equation(difference.p_value)}, margin -{margin:g}"
    )
    with_tokens = f"{first} at {100 * tokens:.1f} % of the tokens"
    if 100 * low > -margin:
        answer, said = "non-inferior", f"{with_tokens} is non-inferior to {second} ({numbers})"
    elif 100 * high < -margin:
        answer, said = "inferior", f"{with_tokens} is worse than {second} by more than the margin ({numbers})"
    else:
        answer, said = "not shown", f"it is not shown that {with_tokens} is non-inferior to {second} ({numbers})"
    return Primary(scene, answer, f"In {scene}, {said}.")
