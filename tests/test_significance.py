"""Intervals and tests against SciPy's, an implementation of its own."""

import pytest
from scipy import stats

from prismatic.significance import mcnemar_exact, wilson_interval


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


@pytest.mark.parametrize("only_first", range(0, 12, 3))
@pytest.mark.parametrize("only_second", [0, 1, 5, 40])
def test_mcnemar_equals_the_binomial_test(only_first: int, only_second: int) -> None:
    discordant = only_first + only_second
    expected = stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    assert mcnemar_exact(only_first, only_second) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)
