"""Pairing and verdicts, against outcomes counted one by one and SciPy's tests."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from paired_results import compared, results, rollout, task_with
from scipy import stats

from experiments.robot.libero.comparison.compare import (
    AVERAGE,
    compare,
    p_equation,
    p_text,
    plan_unpaired,
    points,
    round_up,
    span,
)
from experiments.robot.libero.comparison.outcomes import PairedOutcome
from experiments.robot.libero.results.results import Results
from prismatic.significance import (
    Interval,
    PairedCounts,
    averaged_difference_interval,
    holm,
    paired_bootstrap,
    paired_detectable,
    paired_difference_interval,
    paired_trials,
    unpaired_detectable,
    unpaired_trials,
    wilson_interval,
)


def test_several_files_of_several_suites_equal_counting_by_hand() -> None:
    """Two suites, unequal numbers of starts, two seeds, invalid rollouts, files cut differently on either side."""
    rng = random.Random(4)
    first, second, pairs = [], [], {}
    for suite, task, seed in itertools.product(("libero_goal", "libero_object"), range(3), (7, 8)):
        for state in range(rng.randrange(5, 9)):
            outcomes = [rng.choice([True, True, False, None]) for _ in range(2)]
            first.append(rollout(task, state + 10 * seed, outcomes[0], suite, seed=seed))
            second.append(rollout(task, state + 10 * seed, outcomes[1], suite, seed=seed))
            if None not in outcomes:
                pairs.setdefault((suite, task), []).append(outcomes)
    first.append(rollout(2, 40, True))
    second += [rollout(2, 41, True), rollout(2, 42, True)]
    shuffled = random.Random(1).sample(second, len(second))
    sides = (
        [results([e for e in first if e.seed == seed]) for seed in (7, 8)],
        [results([e for e in shuffled if e.suite == suite]) for suite in ("libero_object", "libero_goal")],
    )
    found = compare(*sides, ("A", "B"))

    assert found.pairing.both == len(first) - 1 and found.pairing.only == (1, 2)
    assert found.pairing.invalid == (
        sum(e.success is None for e in first),
        sum(e.success is None for e in second),
    )
    assert found.pairing.counted == sum(map(len, pairs.values()))
    assert [(row.suite, row.name) for row in found.tasks] == [(s, f"do task {t}") for s, t in sorted(pairs)]
    for row, key in zip(found.tasks, sorted(pairs), strict=True):
        check_row(row, pairs[key])
        assert row.interval == paired_difference_interval(row.counts)
    corrected = holm([stats.binomtest(r.counts[1], r.counts.discordant, 0.5).pvalue for r in found.tasks])
    assert [row.corrected_p for row in found.tasks] == pytest.approx(corrected, abs=1e-12)

    rates = {key: np.mean(outcomes, axis=0) for key, outcomes in pairs.items()}
    by_suite = {s: np.mean([rates[s, task] for task in range(3)], axis=0) for s in ("libero_goal", "libero_object")}
    for row in found.suites:
        own = [outcomes for key, outcomes in pairs.items() if key[0] == row.suite]
        weights = [1 / (3 * len(outcomes)) for outcomes in own for _ in outcomes]
        check_row(row, sum(own, []), by_suite[row.suite], weights)
    average = np.mean(list(by_suite.values()), axis=0)
    weights = [1 / (6 * len(outcomes)) for outcomes in pairs.values() for _ in outcomes]
    check_row(found.overall, sum(pairs.values(), []), average, weights)
    assert found.overall.name == AVERAGE and found.overall.suite == ""
    groups = [[r.counts for r in found.tasks if r.suite == suite.suite] for suite in found.suites]
    difference, drawn = paired_bootstrap(groups)
    of_tasks = averaged_difference_interval(groups)
    hull = (min(drawn.low, of_tasks.low), max(drawn.high, of_tasks.high))
    assert (found.overall.difference, found.overall.interval) == (difference, hull)
    assert found.warnings == ()


def check_row(
    row: PairedOutcome, outcomes: list[list[bool]], rates: np.ndarray | None = None, weights: Sequence[float] = ()
) -> None:
    """Against counting; of averages `weights` are those of the single outcomes, which sum up to 1."""
    tally = Counter(map(tuple, outcomes))
    assert row.counts == tuple(tally[pair] for pair in [(True, True), (True, False), (False, True), (False, False)])
    solved = [sum(side) for side in zip(*outcomes, strict=True)]
    assert row.solved == tuple(solved)
    rates = np.array(solved) / len(outcomes) if rates is None else rates
    assert row.rates == pytest.approx(tuple(rates)) and row.difference == pytest.approx(rates[0] - rates[1])
    trials = 1 / np.square(weights).sum() if weights else len(outcomes)
    assert row.effective_trials == pytest.approx(trials)
    for interval, rate in zip(row.wilson, rates, strict=True):
        doubt = stats.norm.ppf(0.975) ** 2 / trials
        # Where the score test is on its edge: (rate - x)^2 = doubt x (1 - x).
        assert interval == pytest.approx(sorted(np.roots([1 + doubt, -2 * rate - doubt, rate**2])), abs=1e-12)
        assert interval.low <= rate <= interval.high
    expected_p = stats.binomtest(row.counts[1], row.counts[1] + row.counts[2], 0.5).pvalue
    assert row.p_value == pytest.approx(expected_p, abs=1e-12)


def test_warnings_name_the_settings_that_differ() -> None:
    first, second = task_with((3, 1, 1, 1))

    def warned(change: Results) -> tuple[str, ...]:
        return compare([results(first)], [change], ("A", "B")).warnings

    for config, words in (
        ({"num_open_loop_steps": 4}, "actions executed of each chunk 8 for A; 4 for B"),
        ({"num_steps_wait": 20}, "settling steps 10 for A; 20 for B"),
        ({"env_img_res": 128}, "side of the pictures in pixels 256 for A; 128 for B"),
        ({"control": "blank_images"}, "control none for A; blank_images for B"),
    ):
        assert warned(results(second, **config)) == (f"not the same protocol: {words}",)
    other = results(second)
    other.versions["mujoco"], other.run["renderer"], other.run["complete"] = "3.3.0", "fast", False
    assert warned(other) == (
        "not the same protocol: renderer robosuite for A; fast for B",
        "not the same protocol: mujoco 3.2.3 for A; 3.3.0 for B",
        "B: 1 of 1 evaluations did not get to the end",
    )
    following = results(second, num_open_loop_steps=None)
    following.policy["robot"] = {"open_loop_steps": 8}
    assert warned(following) == ()
    following.policy["robot"] = {"open_loop_steps": 25}
    assert warned(following) == ("not the same protocol: actions executed of each chunk 8 for A; 25 for B",)


def test_a_recorded_protocol_is_compared_suite_by_suite() -> None:
    sides = []
    for side in (0, 1):
        sides.append([])
        for suite, cap in (("libero_goal", 300), ("libero_10", 520)):
            part = results(task_with((2, 1, 1, 1), suite=suite)[side])
            part.run["protocol"] = {"max_steps": cap, "settle_action": [0, -1]}
            sides[side].append(part)
    assert compare(sides[0], sides[1], ("A", "B")).warnings == ()
    sides[1][0].run["protocol"]["max_steps"] = 400
    assert compare(sides[0], sides[1], ("A", "B")).warnings == (
        "not the same protocol: protocol max_steps 300 for A; 400 for B",
    )
    del sides[1][1].run["protocol"]
    assert "not the same protocol: protocol settle_action [0, -1] for A; not recorded for B" in (
        compare(sides[0], sides[1], ("A", "B")).warnings
    )


def test_deviations_repeat_what_is_compared_anyway() -> None:
    """The starts in common are identical, whether or not one of the two evaluated further tasks."""
    sides = []
    for episodes, deviations in zip(
        task_with((2, 1, 1, 1)), (["seeding"], ["--task_ids 1: ...", "seeding"]), strict=True
    ):
        sides.append(results(episodes))
        sides[-1].run["protocol"] = {"name": "openvla-oft", "max_steps": 300, "deviations": deviations}
    assert compare(sides[:1], sides[1:]).warnings == ()
    sides[1].run["protocol"]["name"] = "lerobot"
    assert compare(sides[:1], sides[1:], ("A", "B")).warnings == (
        "not the same protocol: protocol name openvla-oft for A; lerobot for B",
    )


def test_an_average_over_standard_and_perturbed_suites_is_warned_about() -> None:
    parts = [task_with((2, 1, 1, 1), suite=suite) for suite in ("libero_goal", "libero_goal_swap")]
    sides = [[results(part[side]) for part in parts] for side in (0, 1)]
    assert compare(sides[0], sides[1]).warnings == (
        "the average mixes suites of different perturbations: none, position",
    )


def test_the_verdict_names_the_better_one() -> None:
    even = [(10, 12, 1, 2)] * 4
    found = compared(*even)
    low, high = (points(end) for end in found.overall.interval)
    assert found.distinguishable and found.overall.interval.low > 0
    assert found.verdict == f"A is better than B: +44.0 points, 95 % interval {low} to {high}, p < 0.001."
    mirrored = compared(*[(both, b, a, neither) for both, a, b, neither in even])
    assert mirrored.verdict.startswith("B is better than A: +44.0 points, 95 % interval +")


def test_a_difference_in_one_task_of_many_is_called_uneven() -> None:
    found = compared((5, 20, 0, 0), *[(10, 2, 2, 11)] * 9)
    assert found.distinguishable and found.overall.interval.low <= 0.0
    assert "A is better than B: +8.0 points" in found.verdict and "uneven" in found.verdict


def test_no_verdict_where_chance_explains_it() -> None:
    found = compared((6, 3, 1, 2), (5, 2, 2, 3), (7, 1, 2, 2))
    share, gap = 11 / 36, 1 / 36
    needed, seen = round_up(paired_trials(gap, share)), paired_detectable(36, share)
    assert not found.distinguishable
    assert found.verdict.startswith(
        "A and B are not distinguishable: 66.7 % and 63.9 % of the same 36 episodes (+2.8 points"
    )
    assert found.verdict.endswith(
        f"). Were the true difference 2.8 points, as measured, four of five evaluations with about {needed} episodes "
        "each would tell the two apart (80 % power); with 36 episodes, as here, that takes a true difference of about "
        f"{100 * seen:.0f} points."
    )


def test_an_interval_without_0_is_no_verdict() -> None:
    """Four starts to none: McNemar's test has p = 0.125 at best, whatever the interval says."""
    found = compared((0, 2, 0, 0), (0, 1, 0, 1), (0, 1, 0, 1))
    assert found.overall.interval.low > 0 and found.overall.p_value == stats.binomtest(4, 4).pvalue == 0.125
    assert (
        "The interval excludes 0, but the verdict goes by the test. It counts only the 4 episodes on which the two "
        "differ, and 4 for A with 0 for B are not enough for it (fewer than 6 never are). Were the true"
        in found.verdict
    )
    assert stats.binomtest(5, 5).pvalue >= 0.05 > stats.binomtest(6, 6).pvalue
    mirrored = compared((0, 0, 2, 0), (0, 0, 1, 1), (0, 0, 1, 1))
    assert mirrored.overall.interval.high < 0 and "0 for A with 4 for B are not enough" in mirrored.verdict
    split = compared((0, 9, 2, 9))
    assert split.overall.interval.low > 0 and not split.distinguishable
    assert stats.binomtest(9, 11).pvalue >= 0.05 > stats.binomtest(10, 11).pvalue
    assert "9 for A with 2 for B are not enough for it (10 of 11 on one side would be)." in split.verdict
    assert "excludes 0" not in compared((6, 3, 1, 2), (5, 2, 2, 3)).verdict


def test_equal_outcomes_do_not_prove_equality() -> None:
    """Twice the same rollouts: the interval keeps a width, and the numbers are about a difference of 5 points."""
    found = compared((6, 0, 0, 2), (5, 0, 0, 3))
    assert found.overall.interval == paired_difference_interval(PairedCounts(11, 0, 0, 5))
    assert found.overall.interval.low < 0 < found.overall.interval.high
    needed = round_up(paired_trials(0.05, 0.05))
    assert f"difference 5.0 points, four of five evaluations with about {needed} episodes each" in found.verdict
    assert compared((2, 0, 1, 0)).verdict.endswith("with 3 episodes, as here, no difference is large enough for that.")


def test_losing_an_episode_never_raises_the_lower_bound() -> None:
    """By a bootstrap it is -8.3 points with one lost of 36, and 0.0 with one won; of 36 that agree Tango's is -9.6."""
    lows = [compared((12 - n, 0, n, 0), (12, 0, 0, 0), (12, 0, 0, 0)).overall.interval.low for n in range(6)]
    assert lows == sorted(lows, reverse=True) and lows[1] < -0.14
    won = compared((11, 1, 0, 0), (12, 0, 0, 0), (12, 0, 0, 0)).overall.interval
    assert won.low == paired_difference_interval(PairedCounts(35, 1, 0, 0)).low < -0.06


def test_what_an_evaluation_says_of_itself_is_told() -> None:
    first, second = task_with((3, 1, 1, 1))
    sides = [results(first), results(second)]
    sides[1].run["warnings"] = ["--force: gone on although the weights of its policy were others"]
    sides[1].config["shard"] = "2/4"
    found = compare([sides[0]], [sides[1]], ("A", "B"))
    assert found.warnings == (
        "B: this is shard 2/4 of the rollouts",
        "B: --force: gone on although the weights of its policy were others",
    )


def test_an_interval_is_about_its_own_difference() -> None:
    """One task of 10 starts for the first, another suite's of 40 for the second: 0 points on average, not -60."""
    sides = [task_with((0, 10, 0, 0), suite="libero_goal"), task_with((0, 0, 40, 0), suite="libero_object")]
    found = compare([results(a) for a, _ in sides], [results(b) for _, b in sides]).overall
    assert found.difference == 0.0 and found.counts == (0, 10, 40, 0)
    assert found.interval == averaged_difference_interval([[PairedCounts(0, 10, 0, 0)], [PairedCounts(0, 0, 40, 0)]])
    assert found.interval.low < 0.0 < found.interval.high


def test_an_average_over_unequal_tasks_is_called_one() -> None:
    uneven, even = compared((12, 0, 0, 0), (0, 0, 0, 1)), compared((5, 0, 1, 0), (5, 1, 0, 0))
    assert "50.0 % and 50.0 % on average over tasks, of the same 13 episodes" in uneven.verdict
    assert uneven.overall.uneven and not even.overall.uneven
    assert "91.7 % and 91.7 % of the same 12 episodes" in even.verdict
    assert even.overall.wilson[0] == pytest.approx(wilson_interval(11, 12))


def test_a_lopsided_average_is_no_verdict() -> None:
    """More starts for the first, but the average over tasks points the other way."""
    found = compared((0, 30, 10, 0), (0, 0, 3, 0))
    assert found.overall.p_value < 0.05 and found.overall.difference < 0
    assert not found.distinguishable and "not distinguishable" in found.verdict
    assert "p is small because more episodes fell to A, but averaged over tasks A is not ahead." in found.verdict


def test_plans_give_the_planned_numbers() -> None:
    found = compared((6, 3, 1, 2), (5, 2, 2, 3))
    paired, unpaired = found.plan(0.1)
    needed = round_up(paired_trials(0.1, 8 / 24))
    assert f"10 points: about {needed} trials per policy, {-(-needed // 2)} for each of 2 tasks" in paired
    assert "differ on 33.3 %" in paired
    assert [unpaired] == plan_unpaired("A", 16 / 24, 24, 0.1)
    assert f"about {round_up(unpaired_trials(16 / 24, 16 / 24 - 0.1))} trials per policy on unrelated" in unpaired
    seen = unpaired_detectable(24, 16 / 24)
    assert unpaired.endswith(f"; with 24, as here, only a difference of about {100 * seen:.0f} points is detected.")
    assert "No policy is 70 points away" in plan_unpaired("A", 0.6, 24, 0.7)[0]
    [few] = plan_unpaired("A", 0.5, 2, 0.1)
    assert few.endswith("; with 2, as here, no difference is large enough to be detected.")
    assert str(round_up(paired_trials(0.5, 0.5))) in found.plan(0.5)[0], "the share is raised to the difference"


def test_numbers_in_words() -> None:
    assert [points(x) for x in (0.0556, -0.1, 0.0001, -0.0001)] == ["+5.6", "-10.0", "0.0", "0.0"]
    assert points(-0.2125) == points(-0.21250000000000002) == "-21.2"
    assert span(Interval(0.0, 1.0), signed=True) == "0.0 to +100.0" and span(Interval(0.1378, 0.609)) == "13.8 to 60.9"
    assert [p_equation(p) for p in (0.00004, 0.0312, 0.5, 1.0)] == ["p < 0.001", "p = 0.031", "p = 0.50", "p = 1.00"]
    assert [p_text(p) for p in (0.0496, 0.0504, 0.05, 0.0625, 0.09, 0.1, 0.04999)] == (
        ["0.0496", "0.0504", "0.050", "0.062", "0.090", "0.10", "0.04999"]
    )
    assert [round_up(n) for n in (7, 47, 783, 790, 12345)] == [7, 47, 790, 790, 13000]
