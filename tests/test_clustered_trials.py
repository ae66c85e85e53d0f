"""Intervals of trials that come in clusters."""

import math

import numpy as np
import pytest

from prismatic.clustered_trials import clustered_bootstrap, clustered_difference, clustered_rate
from prismatic.significance import PairedCounts, paired_difference_interval, wilson_interval

BOTH, LOST, WON = (True, True), (False, True), (True, False)


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


def test_single_trials_have_the_intervals_of_single_trials() -> None:
    solved = [[[True]] * 7 + [[False]] * 3, [[True]] * 10]
    assert clustered_rate(solved) == (pytest.approx(0.85), pytest.approx(wilson_interval(17, 20)))
    pairs = [[[BOTH]] * 8 + [[LOST]] * 2, [[BOTH]] * 9 + [[WON]]]
    tango = paired_difference_interval(PairedCounts(17, 1, 2, 0))
    assert clustered_difference(pairs) == (pytest.approx(-0.05), pytest.approx(tango))


def test_trials_that_agree_are_worth_one() -> None:
    assert clustered_rate([[[True] * 5] * 7 + [[False] * 5] * 3])[1] == pytest.approx(wilson_interval(7, 10), abs=0.03)
    alike = clustered_difference([[[BOTH] * 6] * 12])
    assert alike == (0.0, pytest.approx(paired_difference_interval(PairedCounts(12, 0, 0, 0))))


def test_independent_trials_of_a_start_are_worth_almost_all_of_them() -> None:
    rng = np.random.default_rng(0)
    wide, alone = [], []
    for _ in range(40):
        solved = rng.random((36, 6)) < 0.7
        wide.append(np.diff(clustered_rate([solved.tolist()])[1])[0])
        alone.append(np.diff(wilson_interval(int(solved.sum()), 216))[0])
    assert 1 <= np.mean(wide) / np.mean(alone) < 1.2


def test_losing_a_start_never_raises_the_lower_bound() -> None:
    """As a percentile bootstrap does, which sees no spread in what did not differ."""
    starts = [[[LOST]] * lost + [[BOTH]] * (12 - lost) for lost in range(13)]
    lows = [clustered_difference([task, [[BOTH]] * 12, [[BOTH]] * 12])[1].low for task in starts]
    assert lows == sorted(lows, reverse=True) and lows[0] == pytest.approx(-0.096, abs=1e-3) and lows[1] < -0.14


def test_a_loss_of_the_margin_is_seldom_taken_for_none() -> None:
    """Three tasks of 12 starts; a tenth of the starts are lost, none won. Exact: the sum over how many are."""
    wrong = 0.0
    for lost in range(37):
        of_tasks = [min(12, max(0, lost - 12 * task)) for task in range(3)]
        tasks = [[[LOST]] * number + [[BOTH]] * (12 - number) for number in of_tasks]
        if clustered_difference(tasks)[1].low > -0.1:
            wrong += math.comb(36, lost) * 0.1**lost * 0.9 ** (36 - lost)
    assert wrong < 0.03


@pytest.mark.parametrize("alike", [False, True])
def test_intervals_of_clusters_cover_the_truth(alike: bool) -> None:
    """Starts of three rollouts whose losses come together, or not: the true difference is -0.1."""
    rng, missed = np.random.default_rng(3), [0, 0]
    for _ in range(150):
        lost = rng.random((3, 12, 1 if alike else 3)) < 0.1
        lost = np.broadcast_to(lost, (3, 12, 3))
        tasks = [[[LOST if one else BOTH for one in start] for start in task] for task in lost]
        low, high = clustered_difference(tasks)[1]
        missed[0] += low > -0.1
        missed[1] += high < -0.1
    assert max(missed) <= 9


@pytest.mark.parametrize("tasks", [[], [[]], [[[]]]])
def test_nothing_is_no_difference(tasks) -> None:
    for function in (clustered_rate, clustered_difference):
        with pytest.raises(ValueError, match="at least one task, one cluster in each task, and one trial"):
            function(tasks)
