"""The numbers of the report, made of the kept counts alone: shares against chance, success with and without tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from experiments.robot.libero.comparison.compare import ALPHA
from experiments.robot.libero.looks.config import BLANKED, UNBLANKED
from experiments.robot.libero.looks.counts import Counts, Rollout
from prismatic.clustered_trials import clustered_difference
from prismatic.significance import (
    Interval,
    PairedCounts,
    holm,
    repeated_mcnemar,
)

REPLICATES = 5_000
STAYS_POINTS = 10.0
"""Success stays where the lower end of the paired difference's interval lies above minus so many points."""

Take = Callable[[Rollout], Counts]
"""What of a rollout is counted."""


@dataclass(frozen=True)
class Against:
    """One class: the share of the kept tokens that lies on it, against chance.

    Attributes:
        share: of the kept tokens, by pixels; `majority` by patches that mostly show it.
        chance: the same of as many tokens of the same picture, drawn from all, in the mean.
        ratio: share over chance; None where chance never lies on it.
        share_interval, ratio_interval: 95 %, over initial states; None with a single initial state.
    """

    share: float
    majority: float
    chance: float
    ratio: float | None
    share_interval: Interval | None
    ratio_interval: Interval | None


def against_chance(rollouts: Sequence[Rollout], take: Take, kind: str) -> Against | None:
    """Of all tokens together, whichever task and rollout they are of; None where none was kept.

    The intervals are bootstrap percentiles: a replicate draws, for every task, its initial states with replacement, and
    a drawn one comes with all tokens of all its rollouts (Davison and Hinkley, Bootstrap Methods, 1997, section 3.8).
    """
    clusters: dict[tuple[str, int], dict[int, Counts]] = {}
    for rollout in rollouts:
        of_task = clusters.setdefault((rollout.suite, rollout.task), {})
        of_task[rollout.state] = of_task.get(rollout.state, Counts()) + take(rollout)
    tasks = [
        np.array([(c.on[kind], c.chance[kind], c.majority[kind], c.kept) for c in states.values()], dtype=np.float64)
        for states in clusters.values()
    ]
    on, chance, majority, kept = np.concatenate(tasks).sum(axis=0)
    if not kept:
        return None
    shares = ratios = None
    if max(map(len, tasks)) > 1:
        drawn = _drawn(tasks)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = _interval(drawn[:, 0] / drawn[:, 3])
            ratios = _interval(drawn[:, 0] / drawn[:, 1]) if chance else None
    return Against(on / kept, majority / kept, chance / kept, on / chance if chance else None, shares, ratios)


def _drawn(tasks: Sequence[np.ndarray]) -> np.ndarray:
    """(replicates, columns): sums over initial states that were drawn anew within each task."""
    rng = np.random.default_rng(0)
    total = np.zeros((REPLICATES, tasks[0].shape[1]))
    for rows in tasks:
        total += rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=REPLICATES) @ rows
    return total


def _interval(values: np.ndarray) -> Interval | None:
    finite = values[np.isfinite(values)]
    return Interval(*np.quantile(finite, [0.025, 0.975]).tolist()) if len(finite) else None


@dataclass(frozen=True)
class Blanked:
    """A condition against the unblanked rollouts from the same starts.

    Attributes:
        counts: of starts: both solved, the blanked alone, the unblanked alone, neither.
        difference: success rate of the blanked less that of the unblanked, averaged over tasks, in [-1, 1].
        interval: 95 %, over initial states.
        p_value: of McNemar's test by initial states; `corrected_p` is Holm's over all conditions.
        tokens, kept: blanked and kept per policy query, in the mean.
        queries: of the blanked rollouts.
        beyond_random: of `target`, where `random` was rolled out too: the difference to that, and its p by Holm.
    """

    condition: str
    counts: PairedCounts
    difference: float
    interval: Interval
    p_value: float
    tokens: float
    kept: float
    queries: int
    corrected_p: float = 1.0
    beyond_random: tuple[float, float] | None = None

    @property
    def stays(self) -> bool:
        """Whether success stays, within `STAYS_POINTS`."""
        return 100 * self.interval.low > -STAYS_POINTS

    @property
    def falls(self) -> bool:
        """Whether it falls, by the corrected p."""
        return self.difference < 0 and self.corrected_p < ALPHA


def all_blanked(rollouts: Sequence[Rollout]) -> list[Blanked]:
    """Every condition that shares starts with the unblanked rollouts, in `BLANKED`'s order."""
    found = [each for kind in BLANKED if (each := blanked(rollouts, kind)) is not None]
    beyond = blanked(rollouts, "target", against="random")
    tested = found if beyond is None else [*found, beyond]
    corrected = holm([each.p_value for each in tested])
    told = [replace(each, corrected_p=p_value) for each, p_value in zip(tested, corrected, strict=True)]
    if beyond is None:
        return told
    last = told.pop()
    said = (last.difference, last.corrected_p)
    return [replace(each, beyond_random=said) if each.condition == "target" else each for each in told]


def blanked(rollouts: Sequence[Rollout], condition: str, against: str = UNBLANKED) -> Blanked | None:
    """None where the condition shares no start with the other one, by default the unblanked rollouts."""
    before = {each.start: each for each in rollouts if each.condition == against}
    own = [each for each in rollouts if each.condition == condition and each.start in before]
    if not own:
        return None
    pairs: dict[tuple[str, int, int], list[tuple[bool, bool]]] = {}
    for each in own:
        outcomes = (each.success, before[each.start].success)
        pairs.setdefault((each.suite, each.task, each.state), []).append(outcomes)
    gains = {place: sum(a - b for a, b in found) for place, found in pairs.items()}
    tasks = sorted({place[:2] for place in pairs})
    value, interval = clustered_difference([[pairs[p] for p in pairs if p[:2] == task] for task in tasks])
    queries = sum(each.queries for each in own)
    return Blanked(
        condition=condition,
        counts=PairedCounts.of([pair] for found in pairs.values() for pair in found),
        difference=value,
        interval=interval,
        p_value=repeated_mcnemar(Fraction(gain, len(pairs[place])) for place, gain in gains.items()),
        tokens=sum(each.blanked for each in own) / queries,
        kept=sum(each.kept for each in own) / queries,
        queries=queries,
    )
