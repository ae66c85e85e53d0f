"""Rates and differences of trials that come in clusters: rollouts from one initial state resemble each other.

`significance.py` takes every start for a trial of its own. Where one start was tried again and again (with displaced
objects, other seeds, other trainings), its trials are drawn together.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from prismatic.significance import (
    Interval,
    PairedCounts,
    averaged_difference_interval,
    effective_trials,
    wilson_interval,
)

Outcomes = Sequence[bool]
"""Of all trials of one cluster."""
PairedOutcomes = Sequence[tuple[bool, bool]]
"""Likewise, of two policies."""

Cluster = tuple[float, int]
"""The sum of its trials' outcomes (successes, or differences of two policies' successes), and how many they are."""


def clustered_bootstrap(
    tasks: Sequence[Sequence[Cluster]], replicates: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, Interval]:
    """The mean outcome averaged over tasks, with a percentile interval: how it would vary with other starts.

    A replicate draws, for every task, its clusters with replacement; a drawn cluster comes with all its trials (Davison
    and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8; tasks stay as they are, since they are what
    the statement is about). A task's mean is the sum of its outcomes over their number.

    For counts and times. Of few clusters, and of outcomes that are nearly all alike, it is too narrow: `clustered_rate`
    and `clustered_difference` are for those. Where the clusters of every task have one mean it has no width at all.

    Returns:
        The mean and its interval; the same for the same seed.

    Raises:
        ValueError: without tasks, for a task without clusters or a cluster without trials.
    """
    _check([[range(count) for _, count in clusters] for clusters in tasks])
    rng = np.random.default_rng(seed)
    mean, drawn_means = 0.0, np.zeros(replicates)
    for clusters in tasks:
        sums, counts = (np.array(column, dtype=np.float64) for column in zip(*clusters, strict=True))
        times = rng.multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), size=replicates)
        mean += sums.sum() / counts.sum()
        drawn_means += (times @ sums) / (times @ counts)
    low, high = np.quantile(drawn_means / len(tasks), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(mean / len(tasks)), Interval(float(low), float(high))


def clustered_rate(tasks: Sequence[Sequence[Outcomes]], confidence: float = 0.95) -> tuple[float, Interval]:
    """A success rate averaged over tasks, with Wilson's interval for as many trials as the clusters are worth.

    They are worth their number over the design effect (`design_effect`; Rao and Scott, Biometrics 48 (1992), 577-585).
    Tasks count as one sample, which is on the safe side where their rates differ.

    Args:
        tasks: Per task its clusters.

    Raises:
        ValueError: as `clustered_bootstrap`.
    """
    _check(tasks)
    effect = design_effect([[np.asarray(cluster, float) for cluster in task] for task in tasks], variance=0.25)
    rate = float(np.mean([np.mean(np.concatenate(task)) for task in tasks]))
    trials = effective_trials([[sum(map(len, task)) for task in tasks]]) / effect
    return rate, wilson_interval(rate * trials, trials, confidence)


def clustered_difference(tasks: Sequence[Sequence[PairedOutcomes]], confidence: float = 0.95) -> tuple[float, Interval]:
    """Success rate of the first of two policies less the second's, averaged over tasks, with Tango's interval.

    It is `averaged_difference_interval` of the pairs of outcomes, counted as often as they are worth: their number over
    the design effect, as in `clustered_rate`. Unlike a bootstrap it does not narrow where few starts differ.

    Args:
        tasks: Per task its clusters.

    Returns:
        The difference and its interval, in [-1, 1].

    Raises:
        ValueError: as `clustered_bootstrap`.
    """
    _check(tasks)
    gains = [[np.array([float(a) - float(b) for a, b in cluster]) for cluster in task] for task in tasks]
    effect = Fraction(design_effect(gains, variance=1.0))
    counts = [PairedCounts.of([pair] for cluster in task for pair in cluster) for task in tasks]
    worth = [PairedCounts(*(count / effect for count in task)) for task in counts]
    difference = float(np.mean([np.mean(np.concatenate(task)) for task in gains]))
    return difference, averaged_difference_interval([worth], confidence)


def design_effect(tasks: Sequence[Sequence[np.ndarray]], variance: float) -> float:
    """How many trials are worth one, since trials of a cluster resemble each other: from 1 to about a cluster's size.

    The variance of a mean over clusters over that over as many independent trials, within tasks. One more cluster is
    added to what was seen, all of whose trials come out alike, with `variance`: where few outcomes differ nothing tells
    how much alike a cluster is, and then it counts as one trial.

    Args:
        tasks: Per task and cluster the trials' outcomes.
    """
    sizes = np.array([len(cluster) for task in tasks for cluster in task], dtype=float)
    largest = float((sizes**2).sum() / sizes.sum())
    between, within = largest**2 * variance, largest * variance
    for task in tasks:
        trials = np.concatenate(task)
        spread = float(((trials - trials.mean()) ** 2).sum()) * len(trials) / max(len(trials) - 1, 1)
        within += spread
        if len(task) == 1:
            between += largest * spread
            continue
        off = np.array([(cluster - trials.mean()).sum() for cluster in task])
        between += float((off**2).sum()) * len(task) / (len(task) - 1)
    return min(max(between / within, 1.0), largest)


def _check(tasks: Sequence[Sequence[Sequence[object]]]) -> None:
    if not tasks or any(not clusters or min(map(len, clusters)) < 1 for clusters in tasks):
        raise ValueError("an average needs at least one task, one cluster in each task, and one trial of each cluster")
