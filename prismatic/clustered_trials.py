"""Rates and differences of trials that come in clusters: rollouts from one initial state resemble each other.

`significance.py` takes every start for a trial of its own. Where one start was tried again and again (with displaced
objects, other seeds, other trainings), its trials are drawn together.
"""

from collections.abc import Sequence

import numpy as np

from prismatic.significance import Interval

Cluster = tuple[float, int]
"""The sum of its trials' outcomes (successes, or differences of two policies' successes), and how many they are."""


def clustered_bootstrap(
    tasks: Sequence[Sequence[Cluster]], replicates: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, Interval]:
    """The mean outcome averaged over tasks, with a percentile interval: how it would vary with other starts.

    A replicate draws, for every task, its clusters with replacement; a drawn cluster comes with all its trials (Davison
    and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8; tasks stay as they are, since they are what
    the statement is about). A task's mean is the sum of its outcomes over their number.

    Where the clusters of every task have one mean there is no spread, and the interval has no width: that is no
    certainty, and whoever shows it gives another one.

    Returns:
        The mean and its interval; the same for the same seed.

    Raises:
        ValueError: without tasks, for a task without clusters or a cluster without trials.
    """
    if not tasks or any(not clusters or min(count for _, count in clusters) < 1 for clusters in tasks):
        raise ValueError("an average needs at least one task, one cluster in each task, and one trial of each cluster")
    rng = np.random.default_rng(seed)
    mean, drawn_means = 0.0, np.zeros(replicates)
    for clusters in tasks:
        sums, counts = (np.array(column, dtype=np.float64) for column in zip(*clusters, strict=True))
        times = rng.multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), size=replicates)
        mean += sums.sum() / counts.sum()
        drawn_means += (times @ sums) / (times @ counts)
    low, high = np.quantile(drawn_means / len(tasks), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(mean / len(tasks)), Interval(float(low), float(high))
