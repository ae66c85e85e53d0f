"""Intervals of trials that come in clusters."""

import numpy as np
import pytest

from prismatic.clustered_trials import clustered_bootstrap
from prismatic.significance import wilson_interval


def test_the_mean_is_averaged_over_tasks() -> None:
    mean, interval = clustered_bootstrap([[(2, 2), (0, 2)], [(1, 1), (1, 1), (1, 1)]])
    assert mean == 0.75 and interval.low < mean <= interval.high


def test_independent_trials_have_about_wilsons_interval() -> None:
    outcomes = [(1.0, 1)] * 70 + [(0.0, 1)] * 30
    _, interval = clustered_bootstrap([outcomes])
    assert interval == pytest.approx(wilson_interval(70, 100), abs=0.02)


def test_trials_of_a_cluster_that_agree_count_once() -> None:
    once = clustered_bootstrap([[(1.0, 1)] * 7 + [(0.0, 1)] * 3])
    five = clustered_bootstrap([[(5.0, 5)] * 7 + [(0.0, 5)] * 3])
    assert once == five


def test_the_interval_covers_the_truth() -> None:
    """Clusters with rates of their own, two tasks: in 95 of 100 samples or so, where trials taken alone fall short."""
    rng, covered, alone = np.random.default_rng(0), 0, 0
    for number in range(200):
        rates = rng.beta(0.8, 0.8, size=(2, 30))
        solved = rng.binomial(4, rates)
        tasks = [[(float(count), 4) for count in task] for task in solved]
        low, high = clustered_bootstrap(tasks, replicates=1000, seed=number)[1]
        covered += low <= 0.5 <= high
        low, high = wilson_interval(int(solved.sum()), 240)
        alone += low <= 0.5 <= high
    assert covered >= 182 > alone


@pytest.mark.parametrize("tasks", [[], [[]], [[(0.0, 0)]]])
def test_nothing_is_no_rate(tasks) -> None:
    with pytest.raises(ValueError, match="at least one task, one cluster in each task, and one trial"):
        clustered_bootstrap(tasks)
