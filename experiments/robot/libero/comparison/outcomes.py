"""Two policies' outcomes of a task, of a suite, or of all suites: counts, rates, difference, interval and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prismatic.significance import (
    Count,
    Interval,
    PairedCounts,
    averaged_difference_interval,
    effective_trials,
    repeated_bootstrap,
    repeated_mcnemar,
    wilson_interval,
)

Scenes = Sequence[Sequence[tuple[bool, bool]]]
"""Of a task: per initial state the outcomes of both policies, one pair per seed."""


@dataclass(frozen=True)
class PairedOutcome:
    """Both policies on the episodes of a task, of a suite, or of all suites.

    The trials are initial states, not episodes: one that was tried with several seeds counts once, by its mean.

    Args:
        suite: Empty for the average over suites.
        name: The task as text, the suite, or `AVERAGE`.
        counts: Of all episodes together.
        states: Of all initial states together, in fractions where seeds gave different outcomes. With one seed each the
            same as `counts`.
        rates: Success rates of the two, averaged over initial states, then tasks, then suites.
        difference: First less second, so averaged, in [-1, 1].
        interval: 95 % interval of the difference: over initial states for one task, else by bootstrap over tasks and
            these. Where the outcomes of each task are all alike, so that a bootstrap has no spread, over initial states
            alone (`averaged_difference_interval`).
        p_value: McNemar's exact test, two-sided, on the initial states (`repeated_mcnemar`).
        effective_trials: As how many trials of a single rate the rates are sure; see `significance.effective_trials`.
        corrected_p: Holm's correction for the number of tasks; None for suites and their average.
    """

    suite: str
    name: str
    counts: PairedCounts
    states: PairedCounts
    rates: tuple[float, float]
    difference: float
    interval: Interval
    p_value: float
    effective_trials: float
    corrected_p: float | None = None

    @property
    def uneven(self) -> bool:
        """Whether initial states count differently in the rates, as where tasks have unequal numbers of them."""
        return self.effective_trials != self.states.trials

    @property
    def trials(self) -> int:
        """Initial states."""
        return int(self.states.trials)

    @property
    def solved(self) -> tuple[int, int]:
        """Episodes that the first and the second policy solved."""
        counts = self.counts
        return int(counts.both + counts.only_first), int(counts.both + counts.only_second)

    @property
    def repeated(self) -> bool:
        """Whether some initial state was tried with several seeds."""
        return self.counts.trials != self.states.trials

    @property
    def wilson(self) -> tuple[Interval, Interval]:
        """Wilson 95 % intervals of both rates."""
        first, second = (
            wilson_interval(min(rate, 1.0) * self.effective_trials, self.effective_trials) for rate in self.rates
        )
        return first, second


def paired_outcome(suite: str, name: str, suites: Sequence[Sequence[Scenes]], seed: int) -> PairedOutcome:
    """What two policies did on tasks, given per suite, task and initial state; `seed` is of the bootstrap."""
    states = [[PairedCounts.of(scenes) for scenes in tasks] for tasks in suites]
    apart = [[Counter(_difference(scene) for scene in scenes) for scenes in tasks] for tasks in suites]
    episodes = [PairedCounts.of([pair] for scene in scenes for pair in scene) for tasks in suites for scenes in tasks]
    difference, drawn = repeated_bootstrap(apart, seed=seed)
    interval = averaged_difference_interval(states)
    if sum(map(len, suites)) > 1:
        # What did not differ has no spread when it is drawn again, which is not to say that there is no doubt.
        interval = Interval(min(interval.low, drawn.low), max(interval.high, drawn.high))
    rates = [
        float(np.mean([np.mean([float((t.both + t[side]) / t.trials) for t in tasks]) for tasks in states]))
        for side in (1, 2)
    ]
    return PairedOutcome(
        suite,
        name,
        PairedCounts.pooled(episodes),
        PairedCounts.pooled([counts for tasks in states for counts in tasks]),
        (rates[0], rates[1]),
        difference,
        interval,
        repeated_mcnemar(value for tasks in apart for task in tasks for value in task.elements()),
        effective_trials([[counts.trials for counts in tasks] for tasks in states]),
    )


def _difference(scene: Sequence[tuple[bool, bool]]) -> Count:
    """Success rate of the first policy less that of the second on one initial state."""
    counts = PairedCounts.of([scene])
    return counts.only_first - counts.only_second
