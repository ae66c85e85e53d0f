"""How sure success rates and their differences are, and how many trials it takes to be sure.

One rate: the Wilson interval. Two policies tried on the same starts: McNemar's exact test and its form for starts that
were tried repeatedly, an interval for one task or the average over given tasks, a bootstrap over tasks. Several tests
at once: Holm's correction. Planning: trials to see a difference, and the other way round.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A closed interval: of probabilities, both ends in [0, 1], or of their differences, both ends in [-1, 1]."""

    low: float
    high: float


Count = int | Fraction
"""Of starts; a fraction where some were tried repeatedly, with different outcomes."""


class PairedCounts(NamedTuple):
    """How often each pair of outcomes came up where two policies were tried on the same starts.

    A start that was tried repeatedly counts once, each pair of outcomes by its share (`PairedCounts.of`). A share
    varies less than a single trial of the same mean: intervals for single trials are too wide for it, never too narrow.
    """

    both: Count
    only_first: Count
    only_second: Count
    neither: Count

    @property
    def trials(self) -> Count:
        return sum(self)

    @property
    def discordant(self) -> Count:
        """Starts on which they differ."""
        return self.only_first + self.only_second

    @property
    def difference(self) -> float:
        """Success rate of the first less that of the second, in [-1, 1]; 0 without trials."""
        return float((self.only_first - self.only_second) / self.trials) if self.trials else 0.0

    @staticmethod
    def of(starts: Iterable[Sequence[tuple[bool, bool]]]) -> "PairedCounts":
        """Every start once, given the pairs of outcomes of all its trials."""
        cells: list[Count] = [0, 0, 0, 0]
        for outcomes in starts:
            for first, second in outcomes:
                cells[2 * (not first) + (not second)] += Fraction(1, len(outcomes))
        return PairedCounts(*(int(cell) if cell == int(cell) else cell for cell in cells))

    @staticmethod
    def pooled(tables: Sequence["PairedCounts"]) -> "PairedCounts":
        """All starts together, whatever task they belong to."""
        return PairedCounts(*(sum(cell) for cell in zip(*tables, strict=True))) if tables else PairedCounts(0, 0, 0, 0)


def wilson_interval(successes: float, trials: float, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a success rate (no continuity correction).

    Unlike the normal approximation it stays inside [0, 1] and keeps a width at 0 of n and n of n, which is where
    robot evaluations often end up. No trials at all say nothing: (0, 1). Counts need not be whole: see
    `effective_trials`.

    Raises:
        ValueError: when the counts are not 0 <= successes <= trials, or confidence is not inside (0, 1).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie between 0 and trials, got {successes} of {trials}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie inside (0, 1), got {confidence}")
    if trials == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    # At the ends the exact bound is 0 or 1; rounding must not miss it.
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == trials else min(1.0, (centre + spread) / scale)
    return Interval(low, high)


def effective_trials(suites: Sequence[Sequence[Count]]) -> float:
    """As how many trials of a single rate an average over suites of averages over tasks of rates is sure.

    1 / (the sum of w^2 / n), where the rate of n trials has the weight w in the average: Kish, Survey Sampling, 1965,
    section 11.7. Of tasks with equally many trials, in suites of equally many tasks, it is all trials together. An
    average with its `wilson_interval` for so many trials always lies inside.

    Args:
        suites: Per suite and task the trials.

    Raises:
        ValueError: without suites, or for a suite without tasks or a task without trials.
    """
    if not suites or any(not tasks or min(tasks) < 1 for tasks in suites):
        raise ValueError("an average needs at least one suite, one task in each suite, and one trial of each task")
    doubt = sum(Fraction(1, (len(suites) * len(tasks)) ** 2) / trials for tasks in suites for trials in tasks)
    return float(1 / doubt)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value that two policies tried on the same starts are equally good.

    Only the discordant starts count: `only_first` were solved by the first policy alone, `only_second` by the second
    alone. Under equality each of them is a fair coin, so this is the exact binomial test.

    Raises:
        ValueError: when a count is negative.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts must not be negative, got {only_first} and {only_second}")
    discordant = only_first + only_second
    smaller = min(only_first, only_second)
    tail = sum(math.comb(discordant, k) for k in range(smaller + 1))
    return min(1.0, 2 * tail / 2**discordant)


def repeated_mcnemar(differences: Iterable[Count]) -> float:
    """`mcnemar_exact` for starts that were tried repeatedly: two-sided p-value that two policies are equally good.

    Under equality the policies' names could be swapped at every start, all trials of a start together: its difference
    would be as often d as -d. The p-value is the share of all swaps whose sum of differences is at least as far from 0
    as the one that was found (Fisher's randomisation test, The Design of Experiments, 1935, section 21, by starts).
    Where each start was tried once, or all its trials had one outcome, it is McNemar's exact test of the starts.

    Args:
        differences: Per start the success rate of the first policy less that of the second, in [-1, 1]. Exact, so that
            equal sums are equal.
    """
    given = list(differences)
    sizes = Counter(Fraction(max(value, -value)) for value in given if value)
    if len(sizes) < 2:
        return mcnemar_exact(sum(d > 0 for d in given), sum(d < 0 for d in given))
    unit = math.lcm(*(size.denominator for size in sizes))
    distances = {int(size * unit): number for size, number in sizes.items()}
    # Of the sum over swaps, in steps of 1 / unit: entry j holds the chance of j - farthest.
    chances, farthest = np.ones(1), 0
    for distance, number in distances.items():
        of_size = np.zeros(2 * distance * number + 1)
        of_size[:: 2 * distance] = [math.comb(number, k) / 2**number for k in range(number + 1)]
        chances, farthest = np.convolve(chances, of_size), farthest + distance * number
    found = abs(int(sum(given) * unit))
    if found == 0:
        return 1.0
    return float(min(1.0, 2 * chances[farthest + found :].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests corrected so that the chance of any false alarm stays below the level (Holm 1979).

    Sorted upwards, the k-th of m (counted from 0) is multiplied by m - k, never less than the one before, at most 1. No
    assumption is made about how the tests depend on each other. Holm, Scandinavian Journal of Statistics 6, 65-70.

    Raises:
        ValueError: for a value outside [0, 1].
    """
    if wrong := [p for p in p_values if not 0.0 <= p <= 1.0]:
        raise ValueError(f"p-values lie in [0, 1], got {wrong[0]}")
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def paired_difference_interval(counts: PairedCounts, confidence: float = 0.95) -> Interval:
    """Interval of the difference of two success rates on the same starts of one task.

    Tango's score interval: all differences d to which a score test does not object, with the share of starts that only
    the second solved at its likeliest value given d. It is Wilson's idea for pairs: it stays inside [-1, 1] and keeps a
    width where the policies agree on every start. Tango, Statistics in Medicine 17 (1998), 891-908.

    Raises:
        ValueError: for negative counts, or confidence not inside (0, 1).
    """
    if min(counts) < 0:
        raise ValueError(f"counts must not be negative, got {tuple(counts)}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie inside (0, 1), got {confidence}")
    if counts.trials == 0:
        return Interval(-1.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    first, second = counts.only_first, counts.only_second
    return Interval(-_score_bound(second, first, counts.trials, z), _score_bound(first, second, counts.trials, z))


def paired_bootstrap(
    suites: Sequence[Sequence[PairedCounts]], replicates: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, Interval]:
    """Difference of two success rates with a percentile interval: how it would vary with other tasks and other starts.

    The difference is averaged over the starts of a task, then over the tasks of a suite, then over suites. A replicate
    draws each suite's tasks with replacement, then, for every drawn task, its starts with replacement (two-stage
    bootstrap, Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). Outcomes of a start
    being pairs of bits, drawing starts is drawing from a multinomial.

    A start that was tried repeatedly is drawn with all its trials (`repeated_bootstrap`).

    Drawing twice counts the chance among starts twice: where many tasks differ by chance alone the interval is up to
    1.4 times too wide. It is too narrow where few starts differ (`averaged_difference_interval` is not), and over two
    or three tasks, of which a replicate can draw no others. With one task in a suite only starts are drawn.

    Args:
        suites: Per suite and task the outcomes of the starts.

    Returns:
        The difference and its interval, in [-1, 1]; the same for the same seed.

    Raises:
        ValueError: without suites, or for a suite without tasks or a task without starts.
    """
    _check_has_starts(suites)
    tables: list[list[dict[Count, Count]]]
    tables = [[{1: t.only_first, -1: t.only_second, 0: t.both + t.neither} for t in tasks] for tasks in suites]
    return repeated_bootstrap(tables, replicates, confidence, seed)


def repeated_bootstrap(
    suites: Sequence[Sequence[Mapping[Count, Count]]],
    replicates: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, Interval]:
    """As `paired_bootstrap`, for starts that may have been tried repeatedly.

    Args:
        suites: Per suite and task: difference of the two policies' success rates on a start, in [-1, 1] -> the whole
            number of starts with it.
    """
    rng = np.random.default_rng(seed)
    total, difference = np.zeros(replicates), 0.0
    for tasks in suites:
        values = [1, -1, *sorted({value for task in tasks for value in task} - {1, -1, 0}), 0]
        table = np.array([[int(task.get(value, 0)) for value in values] for task in tasks])
        trials, worth = table.sum(axis=1), np.array([float(value) for value in values])
        picked = rng.integers(len(tasks), size=(replicates, len(tasks)))
        drawn = rng.multinomial(trials[picked], (table / trials[:, None])[picked])
        total += ((drawn @ worth) / trials[picked]).mean(axis=1)
        difference += float(np.mean(table @ worth / trials))
    low, high = np.quantile(total / len(suites), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return difference / len(suites), Interval(float(low), float(high))


def averaged_difference_interval(suites: Sequence[Sequence[PairedCounts]], confidence: float = 0.95) -> Interval:
    """Interval of the difference that `paired_bootstrap` estimates, over starts alone: the tasks stay as they are.

    Unlike the bootstrap it keeps a width where the outcomes of every task are all alike. Where each task's part of the
    starts is its weight in the average, all starts together estimate the same difference, and Tango's interval of their
    counts is given. Elsewhere the tasks' own intervals (l, u) around their differences d are combined by their weights
    w: the average of d, less the square root of the sum of (w (d - l))^2, and plus that of (w (u - d))^2. Zou, Huang
    and Zhang, Computational Statistics and Data Analysis 53 (2009), 1080-1085, for independent proportions.

    Args:
        suites: Per suite and task the outcomes of the starts.

    Returns:
        An interval around the difference, in [-1, 1].

    Raises:
        ValueError: without suites, for a suite without tasks or a task without starts, for negative counts, or
            confidence not inside (0, 1).
    """
    _check_has_starts(suites)
    tasks = [counts for suite in suites for counts in suite]
    shares = [len(suites) * len(suite) for suite in suites for _ in suite]  # one over the weight
    pooled = PairedCounts.pooled(tasks)
    if all(counts.trials * share == pooled.trials for counts, share in zip(tasks, shares, strict=True)):
        return paired_difference_interval(pooled, confidence)
    difference, below, above = 0.0, 0.0, 0.0
    for counts, share in zip(tasks, shares, strict=True):
        low, high = paired_difference_interval(counts, confidence)
        difference += counts.difference / share
        below += ((counts.difference - low) / share) ** 2
        above += ((high - counts.difference) / share) ** 2
    return Interval(max(-1.0, difference - math.sqrt(below)), min(1.0, difference + math.sqrt(above)))


def unpaired_trials(first: float, second: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Trials per policy after which two success rates are told apart with probability `power`, on unrelated starts.

    Two-sided z-test of two proportions without continuity correction: with p the mean of both rates,
    n = (z(1 - alpha/2) sqrt(2 p (1 - p)) + z(power) sqrt(p1 (1 - p1) + p2 (1 - p2)))^2 / (p1 - p2)^2.
    Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions, 3rd ed. 2003, equation 4.14.

    Raises:
        ValueError: for equal rates, or rates outside [0, 1].
    """
    if first == second or not (0.0 <= first <= 1.0 and 0.0 <= second <= 1.0):
        raise ValueError(f"expected two different success rates in [0, 1], got {first} and {second}")
    z_alpha, z_power = _normal_quantiles(power, alpha)
    mean = (first + second) / 2
    chance = z_alpha * math.sqrt(2 * mean * (1 - mean))
    effect = z_power * math.sqrt(first * (1 - first) + second * (1 - second))
    return math.ceil(((chance + effect) / (first - second)) ** 2)


def paired_trials(difference: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Starts, tried by both policies, after which McNemar's exact test sees a difference with probability `power`.

    n = (z(1 - alpha/2) sqrt(s) + z(power) sqrt(s - d^2))^2 / d^2 with d the difference and s the discordant share
    (Connor, Biometrics 43 (1987), 207-211), and 1 / d more for continuity: the exact test is discrete, and without
    them reaches a power of 0.75 to 0.79 where 0.8 is asked for.

    Args:
        difference: Of the success rates; its sign does not matter.
        discordant: Share of starts that one policy solves and the other does not, in [difference, 1].

    Raises:
        ValueError: for a difference of 0, or larger than the discordant share.
    """
    gap = abs(difference)
    if not 0.0 < gap <= discordant <= 1.0:
        raise ValueError(
            f"expected 0 < difference <= discordant share <= 1, got a difference of {difference} with {discordant}: "
            "only starts on which the policies differ can make a difference"
        )
    z_alpha, z_power = _normal_quantiles(power, alpha)
    root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - gap**2)
    return math.ceil((root / gap) ** 2 + 1 / gap)


def unpaired_detectable(trials: int, rate: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest difference from a success rate that `trials` per policy show, on unrelated starts (`unpaired_trials`).

    Taken towards one half, where chance is largest, so that a difference the other way shows too.

    Raises:
        ValueError: when not even the largest difference shows in so few trials.
    """
    end = 0.0 if rate > 0.5 else 1.0
    return _smallest(
        lambda share: unpaired_trials(rate, rate + share * (end - rate), power, alpha), trials, abs(end - rate)
    )


def paired_detectable(trials: int, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest difference that `trials` starts tried by both policies show; see `paired_trials`.

    The discordant share is raised to the difference where it is smaller.

    Raises:
        ValueError: when not even a difference of 1 shows in so few trials.
    """
    return _smallest(lambda gap: paired_trials(gap, max(gap, discordant), power, alpha), trials, 1.0)


def _check_has_starts(suites: Sequence[Sequence[PairedCounts]]) -> None:
    if not suites or any(not tasks or any(counts.trials == 0 for counts in tasks) for tasks in suites):
        raise ValueError("an average needs at least one suite, one task in each suite, and one start of each task")


def _score_bound(first: Count, second: Count, trials: Count, z: float) -> float:
    """Upper end of Tango's interval, by bisection: the largest difference that the score test accepts."""
    low, high = float((first - second) / trials), 1.0
    for _ in range(60):
        gap = (low + high) / 2
        linear = (2 * trials - first + second) * gap - first - second
        root = math.sqrt(max(0.0, linear**2 + 8 * trials * second * gap * (1 - gap)))
        nuisance = (root - linear) / (4 * trials)
        accepted = (trials * gap - first + second) ** 2 <= z**2 * trials * (2 * nuisance + gap * (1 - gap))
        low, high = (gap, high) if accepted else (low, gap)
    return low


def _normal_quantiles(power: float, alpha: float) -> tuple[float, float]:
    """z(1 - alpha/2) and z(power)."""
    if not (0.0 < alpha < 1.0 and alpha < power < 1.0):
        raise ValueError(f"expected 0 < alpha < power < 1, got alpha {alpha} and power {power}")
    return NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)


def _smallest(needed: Callable[[float], int], trials: int, largest: float) -> float:
    """The smallest share of the largest difference that needs at most so many trials, times the largest."""
    if needed(1.0) > trials:
        raise ValueError(f"{trials} trials show no difference at all; the largest possible one takes {needed(1.0)}")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= trials else (middle, high)
    return high * largest
