"""How sure a count of successes is: the Wilson interval of one rate, and McNemar's exact test of two paired ones."""

import math
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """A closed interval of probabilities, both ends in [0, 1]."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a success rate (no continuity correction).

    Unlike the normal approximation it stays inside [0, 1] and keeps a width at 0 of n and n of n, which is where
    robot evaluations often end up. No trials at all say nothing: (0, 1).

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
