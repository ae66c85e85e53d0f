"""Intervals, tests and planned numbers against SciPy's, exact enumeration and simulation."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from scipy import optimize, stats

from prismatic.significance import (
    PairedCounts,
    averaged_difference_interval,
    effective_trials,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    paired_detectable,
    paired_difference_interval,
    paired_trials,
    repeated_bootstrap,
    repeated_mcnemar,
    unpaired_detectable,
    unpaired_trials,
    wilson_interval,
)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("trials", [1, 2, 12, 36, 500])
def test_wilson_interval_equals_scipy(trials: int, confidence: float) -> None:
    for successes in range(0, trials + 1, max(1, trials // 12)):
        expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
        found = wilson_interval(successes, trials, confidence)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0.0 <= found.low <= successes / trials <= found.high <= 1.0


def test_wilson_interval_is_closed_at_the_ends() -> None:
    assert wilson_interval(0, 36).low == 0.0
    assert wilson_interval(36, 36).high == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, -1)])
def test_wilson_interval_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="between 0 and trials"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_wilson_interval_refuses_impossible_confidence(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence)


def test_effective_trials_are_all_trials_of_even_averages_only() -> None:
    assert effective_trials([[12, 12, 12]]) == 36 and effective_trials([[7]]) == 7
    assert effective_trials([[50] * 10] * 4) == 2000
    # The variance of the average is p (1 - p) times the sum of the squared weights of single outcomes.
    weights = np.concatenate([np.full(n, w / n) for n, w in ((12, 0.25), (1, 0.25), (5, 0.5))])
    assert effective_trials([[12, 1], [5]]) == pytest.approx(1 / np.square(weights).sum())
    for nothing in ([], [[]], [[3, 0]]):
        with pytest.raises(ValueError, match="at least one"):
            effective_trials(nothing)


@pytest.mark.parametrize("only_first", range(0, 12, 3))
@pytest.mark.parametrize("only_second", [0, 1, 5, 40])
def test_mcnemar_equals_the_binomial_test(only_first: int, only_second: int) -> None:
    discordant = only_first + only_second
    expected = stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    assert mcnemar_exact(only_first, only_second) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)


def test_paired_counts() -> None:
    counts = PairedCounts(both=4, only_first=3, only_second=1, neither=2)
    assert (counts.trials, counts.discordant, counts.difference) == (10, 4, 0.2)
    assert PairedCounts(0, 0, 0, 0).difference == 0.0
    assert PairedCounts.pooled([counts, PairedCounts(1, 0, 5, 0)]) == (5, 3, 6, 2)
    assert PairedCounts.pooled([]) == (0, 0, 0, 0)


def test_holm_equals_the_closure_of_bonferroni() -> None:
    """Holm's method is closed testing with Bonferroni's test of every intersection; here all 2^m of them."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 8):
        p_values = [float(p) for p in rng.choice([0.001, 0.01, 0.02, 0.04, 0.3, 0.9], size)]
        subsets = [s for n in range(1, size + 1) for s in itertools.combinations(range(size), n)]
        bonferroni = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets}
        expected = [max(p for s, p in bonferroni.items() if i in s) for i in range(size)]
        assert holm(p_values) == pytest.approx(expected, abs=1e-15)
    assert holm([]) == []
    with pytest.raises(ValueError, match="1.5"):
        holm([0.1, 1.5])


def score(counts: PairedCounts, gap: float) -> float:
    """Squared score statistic of a difference, its nuisance share found by maximising the likelihood numerically."""
    _, b, c, _ = counts

    def loss(share: float) -> float:
        cells = np.array([share + gap, share, 1 - 2 * share - gap])
        with np.errstate(divide="ignore"):
            logs = np.log(np.maximum(cells, 1e-300))
        return -float(np.dot([b, c, counts.trials - b - c], logs))

    least, most = max(0.0, -gap), (1 - gap) / 2
    best = optimize.minimize_scalar(loss, bounds=(least, most), method="bounded", options={"xatol": 1e-12}).x
    share = min((least, best, most), key=loss)
    return (b - c - counts.trials * gap) ** 2 / (counts.trials * (2 * share + gap - gap**2))


@pytest.mark.parametrize(
    "counts",
    [
        PairedCounts(2, 7, 0, 3),
        PairedCounts(0, 9, 0, 3),
        PairedCounts(3, 0, 0, 9),
        PairedCounts(20, 12, 2, 16),
        PairedCounts(2, 1, 5, 4),
        PairedCounts(0, 0, 6, 0),
    ],
)
def test_the_interval_of_one_task_ends_where_the_score_test_objects(counts: PairedCounts) -> None:
    for confidence in (0.8, 0.95):
        limit = stats.chi2.ppf(confidence, 1)
        low, high = paired_difference_interval(counts, confidence)
        assert -1.0 <= low <= counts.difference <= high <= 1.0 and low < high
        assert high == 1.0 or score(counts, high) == pytest.approx(limit, rel=1e-4)
        assert low == -1.0 or score(counts, low) == pytest.approx(limit, rel=1e-4)
    assert paired_difference_interval(PairedCounts(0, 0, 0, 0)) == (-1.0, 1.0)


def test_the_interval_of_one_task_without_differing_starts_is_wilsons() -> None:
    high = paired_difference_interval(PairedCounts(5, 0, 0, 7)).high
    assert high == pytest.approx(wilson_interval(0, 12).high, abs=1e-12)


@pytest.mark.parametrize("trials", [5, 12, 40])
@pytest.mark.parametrize(("only_first", "only_second"), [(0.1, 0.1), (0.3, 0.1), (0.05, 0.0), (0.6, 0.05)])
def test_the_interval_of_one_task_covers(trials: int, only_first: float, only_second: float) -> None:
    """Exact coverage: every table of outcomes with its probability."""
    covered = 0.0
    for b in range(trials + 1):
        for c in range(trials + 1 - b):
            low, high = paired_difference_interval(PairedCounts(trials - b - c, b, c, 0))
            if low <= only_first - only_second <= high:
                shares = [only_first, only_second, 1 - only_first - only_second]
                covered += stats.multinomial.pmf([b, c, trials - b - c], trials, shares)
    assert covered >= 0.93


@pytest.mark.parametrize("counts", [PairedCounts(-1, 2, 2, 2), PairedCounts(1, 1, 1, -1)])
def test_the_interval_of_one_task_refuses_negative_counts(counts: PairedCounts) -> None:
    with pytest.raises(ValueError, match="negative"):
        paired_difference_interval(counts)


def replicates_of_suite(tasks: list[PairedCounts]) -> Iterator[tuple[float, float]]:
    """Every replicate of a suite's two-stage bootstrap with its probability: all draws of tasks, of starts in each."""
    for picked in itertools.product(tasks, repeat=len(tasks)):
        starts = [[1] * t.only_first + [-1] * t.only_second + [0] * (t.both + t.neither) for t in picked]
        draws = [list(itertools.product(values, repeat=len(values))) for values in starts]
        weight = 1 / len(tasks) ** len(tasks) / math.prod(map(len, draws))
        for drawn in itertools.product(*draws):
            yield float(np.mean([np.mean(values) for values in drawn])), weight


TINY = [
    [[PairedCounts(1, 1, 0, 1)]],
    [[PairedCounts(0, 2, 0, 1), PairedCounts(1, 0, 1, 0)]],
    [[PairedCounts(0, 2, 0, 1), PairedCounts(1, 0, 1, 0)], [PairedCounts(0, 1, 1, 1)]],
]


@pytest.mark.parametrize("suites", TINY)
def test_the_bootstrap_equals_its_exact_distribution(suites: list[list[PairedCounts]]) -> None:
    distribution: dict[float, float] = {}
    for combination in itertools.product(*[list(replicates_of_suite(tasks)) for tasks in suites]):
        value = round(sum(mean for mean, _ in combination) / len(suites), 9)
        weight = math.prod(weight for _, weight in combination)
        distribution[value] = distribution.get(value, 0.0) + weight
    values = np.array(sorted(distribution))
    cumulated = np.cumsum([distribution[v] for v in values])
    assert cumulated[-1] == pytest.approx(1.0)
    checked = 0
    for confidence in (*np.linspace(0.05, 0.9, 18), 0.95):
        difference, found = paired_bootstrap(suites, replicates=40_000, confidence=confidence)
        exact_mean = np.mean([np.mean([t.difference for t in tasks]) for tasks in suites])
        assert difference == pytest.approx(exact_mean, abs=1e-12)
        for end, share in zip(found, (0.5 - confidence / 2, 0.5 + confidence / 2), strict=True):
            # A quantile that falls onto a step of the distribution may come out on either side.
            if np.abs(cumulated - share).min() > 0.01:
                assert end == pytest.approx(values[np.searchsorted(cumulated, share)], abs=1e-6)
                checked += 1
    assert checked >= 10


def test_the_bootstrap_of_one_task_equals_scipys() -> None:
    counts = PairedCounts(100, 60, 30, 210)
    values = np.repeat([1.0, -1.0, 0.0], [60, 30, 310])
    found = paired_bootstrap([[counts]])[1]
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(1))
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.004)


def test_the_bootstrap_counts_each_task_and_suite_alike() -> None:
    """However many starts a task, or tasks a suite has."""
    won, even = PairedCounts(0, 5, 0, 5), PairedCounts(50, 0, 0, 50)
    assert paired_bootstrap([[won, even]])[0] == 0.25
    assert paired_bootstrap([[won], [even, even, even]])[0] == 0.25
    spread = paired_bootstrap([[won, even]])[1]
    assert spread == paired_bootstrap([[won, even]], seed=0)[1] and spread.low == 0.0 and spread.high > 0.5


@pytest.mark.parametrize("uneven", [0.0, 0.1])
def test_the_bootstrap_covers(uneven: float) -> None:
    """Differences of tasks drawn around 0.05: their long-run mean lies inside 95 % of the intervals."""
    rng, hits = np.random.default_rng(3), 0
    for seed in range(200):
        gaps = np.clip(0.05 + uneven * rng.standard_normal(10), -0.3, 0.4)
        tasks = [PairedCounts(*map(int, rng.multinomial(50, [0.4, 0.2 + g / 2, 0.2 - g / 2, 0.2]))) for g in gaps]
        low, high = paired_bootstrap([tasks], replicates=500, seed=seed)[1]
        hits += low <= 0.05 <= high
    assert hits >= 0.93 * 200


def test_the_averaged_interval_of_starts_that_weigh_alike_is_that_of_all_together() -> None:
    suites = [[PairedCounts(3, 2, 1, 2), PairedCounts(1, 4, 2, 1)], [PairedCounts(9, 5, 0, 2)]]
    assert averaged_difference_interval(suites) == paired_difference_interval(PairedCounts(13, 11, 3, 5))
    assert averaged_difference_interval([suites[0][:1]], 0.8) == paired_difference_interval(suites[0][0], 0.8)


def test_the_averaged_interval_combines_tasks_by_their_weights() -> None:
    """Where each task agrees on all n starts, Tango's interval is z^2 / (n + z^2) either way: known in closed form."""
    z2 = stats.norm.ppf(0.975) ** 2
    weights, sizes = (1 / 4, 1 / 4, 1 / 2), (6, 20, 9)
    suites = [[PairedCounts(6, 0, 0, 0), PairedCounts(0, 0, 0, 20)], [PairedCounts(5, 0, 0, 4)]]
    half = math.sqrt(sum((w * z2 / (n + z2)) ** 2 for w, n in zip(weights, sizes, strict=True)))
    assert averaged_difference_interval(suites) == pytest.approx((-half, half), abs=1e-9)
    # All of one task's starts for the first, all of the other's for the second: a difference of 0, not of 10 - 40.
    low, high = averaged_difference_interval([[PairedCounts(0, 10, 0, 0)], [PairedCounts(0, 0, 40, 0)]])
    assert -0.3 < low < 0.0 < high < 0.3
    with pytest.raises(ValueError, match="one start of each task"):
        averaged_difference_interval([[PairedCounts(0, 0, 0, 0)]])


def test_the_averaged_interval_covers() -> None:
    """Tasks of unequal numbers of starts: about 95 % of 1000 draws are covered."""
    rng = np.random.default_rng(1)
    tasks = [(10, [0.2, 0.1, 0.7]), (25, [0.4, 0.05, 0.55]), (15, [0.05, 0.3, 0.65])]
    truth = np.mean([shares[0] - shares[1] for _, shares in tasks])
    draws = [rng.multinomial(trials, shares, 1000) for trials, shares in tasks]
    inside = 0
    for outcomes in zip(*draws, strict=True):
        low, high = averaged_difference_interval([[PairedCounts(0, int(a), int(b), int(c)) for a, b, c in outcomes]])
        assert low <= np.mean([(a - b) / (a + b + c) for a, b, c in outcomes]) <= high
        inside += low <= truth <= high
    assert 0.93 < inside / 1000 < 0.985


@pytest.mark.parametrize("suites", [[], [[]], [[PairedCounts(1, 0, 0, 0)], [PairedCounts(0, 0, 0, 0)]]])
def test_the_bootstrap_refuses_what_has_no_starts(suites: list[list[PairedCounts]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap(suites)


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.6), (0.9, 0.8), (0.95, 0.9), (0.2, 0.6)])
def test_unpaired_trials_give_the_power_asked_for(first: float, second: float) -> None:
    """Power of the z-test, summed over all pairs of counts."""
    for power in (0.8, 0.9):
        trials = unpaired_trials(first, second, power)
        counts = np.arange(trials + 1)
        a, b = counts[:, None] / trials, counts[None, :] / trials
        mean = (a + b) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            z = np.abs(a - b) / np.sqrt(2 * mean * (1 - mean) / trials)
        chance = np.outer(stats.binom.pmf(counts, trials, first), stats.binom.pmf(counts, trials, second))
        assert chance[z > stats.norm.isf(0.025)].sum() == pytest.approx(power, abs=0.025)
        assert unpaired_trials(second, first, power) == trials


def exact_power(trials: int, difference: float, discordant: float) -> float:
    """Of McNemar's exact test at level 0.05, by SciPy's binomial test."""
    power = 0.0
    for differing in range(trials + 1):
        weight = stats.binom.pmf(differing, trials, discordant)
        if weight > 1e-6:
            smaller = np.arange(differing // 2 + 1)
            rejected = smaller[2 * stats.binom.cdf(smaller, differing, 0.5) < 0.05]
            share = (1 + difference / discordant) / 2
            outcomes = {*rejected.tolist(), *(differing - rejected).tolist()}
            power += weight * stats.binom.pmf(sorted(outcomes), differing, share).sum()
    return power


@pytest.mark.parametrize(
    ("difference", "discordant"), [(0.05, 0.05), (0.05, 0.1), (0.1, 0.1), (0.1, 0.4), (0.2, 0.4), (0.4, 0.7)]
)
def test_paired_trials_give_the_power_asked_for(difference: float, discordant: float) -> None:
    trials = paired_trials(difference, discordant)
    # With every differing start on one side the formula asks for a little too much.
    most = 0.82 if discordant > difference else 0.89
    assert 0.785 <= exact_power(trials, difference, discordant) <= most
    assert paired_trials(-difference, discordant) == trials


def test_paired_trials_equal_a_published_example_of_connors_formula() -> None:
    """powerandsamplesize.com: shares 0.45 and 0.05 need 23 pairs, to which the continuity adds 1 / 0.4."""
    assert 23 + 2.5 - 1 < paired_trials(0.4, 0.5) < 23 + 2.5 + 1


@pytest.mark.parametrize("trials", [20, 36, 500])
def test_the_smallest_detectable_difference_takes_just_so_many_trials(trials: int) -> None:
    for rate in (0.0, 0.3, 0.5, 0.95):
        gap = unpaired_detectable(trials, rate)
        direction = -1 if rate > 0.5 else 1
        assert (
            unpaired_trials(rate, rate + direction * gap)
            <= trials
            < unpaired_trials(rate, rate + direction * gap * 0.99)
        )
    for share in (0.0, 0.1, 0.5):
        gap = paired_detectable(trials, share)
        assert paired_trials(gap, max(gap, share)) <= trials < paired_trials(gap * 0.99, max(gap * 0.99, share))


def test_too_few_trials_show_nothing() -> None:
    with pytest.raises(ValueError, match="2 trials show no difference"):
        unpaired_detectable(2, 0.5)
    with pytest.raises(ValueError, match="3 trials show no difference"):
        paired_detectable(3, 0.2)


def test_planning_refuses_the_impossible() -> None:
    with pytest.raises(ValueError, match="two different"):
        unpaired_trials(0.5, 0.5)
    with pytest.raises(ValueError, match="two different"):
        unpaired_trials(0.5, 1.2)
    with pytest.raises(ValueError, match="discordant share"):
        paired_trials(0.3, 0.2)
    with pytest.raises(ValueError, match="discordant share"):
        paired_trials(0.0, 0.2)
    with pytest.raises(ValueError, match="power"):
        paired_trials(0.1, 0.2, power=1.0)


@pytest.mark.parametrize(
    "differences",
    [
        [1, 1, 1, -1, 0],
        [Fraction(2, 3)] * 3,
        [Fraction(2, 3), Fraction(1, 3), 1, -1, Fraction(-1, 2), 0, 1],
        [Fraction(1, 3), Fraction(-1, 3), 1, -1],
    ],
)
def test_the_test_of_repeated_starts_is_the_share_of_all_swaps(differences: list[Fraction]) -> None:
    swaps = itertools.product(*({d, -d} if d else {d} for d in differences))
    sums = [abs(sum(swap)) for swap in swaps]
    expected = sum(total >= abs(sum(differences)) for total in sums) / len(sums)
    assert repeated_mcnemar(differences) == pytest.approx(expected, abs=1e-12)
    assert repeated_mcnemar([]) == 1.0 and repeated_mcnemar([0, 0]) == 1.0


def test_repeated_starts_raise_no_false_alarms() -> None:
    """Equal policies whose trials of one start hang together: as trials of their own they would."""
    rng = np.random.default_rng(5)
    alarms = Counter()
    for _ in range(400):
        rates = rng.choice([0.0, 0.1, 0.9, 1.0], size=(60, 2))  # a start is easy or hard for a policy, by chance
        first, second = (rng.random((60, 3)) < rates[:, side, None] for side in (0, 1))
        differences = [Fraction(int(n), 3) for n in first.sum(axis=1) - second.sum(axis=1)]
        alarms["starts"] += repeated_mcnemar(differences) < 0.05
        alarms["trials"] += mcnemar_exact(int((first & ~second).sum()), int((second & ~first).sum())) < 0.05
    assert alarms["starts"] <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95) < 60 < alarms["trials"]


def test_repeated_starts_are_drawn_whole() -> None:
    """Where trials of a start all agree the bootstrap is that of single trials; else it has the variance of shares."""
    single = [[PairedCounts(3, 2, 1, 2), PairedCounts(1, 4, 2, 1)]]
    as_values = [[{1: t.only_first, -1: t.only_second, 0: t.both + t.neither} for t in single[0]]]
    assert repeated_bootstrap(as_values) == paired_bootstrap(single)
    halves = repeated_bootstrap([[{Fraction(1, 2): 200, 0: 200}]])
    expected = stats.norm.interval(0.95, loc=0.25, scale=np.std([0.5] * 200 + [0.0] * 200) / math.sqrt(400))
    assert halves[0] == 0.25 and halves[1] == pytest.approx(expected, abs=2e-3)


def test_pairs_of_repeated_starts_count_by_their_shares() -> None:
    starts = [[(True, False), (True, True), (False, False)], [(True, False)], [(False, True), (False, True)]]
    counts = PairedCounts.of(starts)
    assert counts == (Fraction(1, 3), Fraction(4, 3), 1, Fraction(1, 3)) and counts.trials == 3
    assert counts.difference == pytest.approx(1 / 9)
