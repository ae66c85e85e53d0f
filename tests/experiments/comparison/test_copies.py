"""Seeds are not trials: what a seed repeats counts once, and what it changes is averaged on its initial state."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from paired_results import results, task_with
from scipy import stats

from experiments.robot.libero.comparison.compare import compare
from experiments.robot.libero.comparison.copies import SEEDS_ARE_NO_TRIALS
from experiments.robot.libero.comparison.policies_table import policies_table
from experiments.robot.libero.comparison.tables import comparison_table
from experiments.robot.libero.results.results import EpisodeRecord, Results
from prismatic.significance import PairedCounts, paired_difference_interval

COUNTS = (20, 12, 5, 13)  # as one seed says: p = 0.14; three times as many would have 0.005


def evaluations(side: int, seeds: tuple[int, ...], hashed: bool = True, acts_alike: bool = True) -> list[Results]:
    """One policy's rollouts of a task with several seeds, all with the same outcomes."""

    def with_seed(episode: EpisodeRecord, seed: int) -> EpisodeRecord:
        acted = f"side {side}, state {episode.initial_state}{'' if acts_alike else f', seed {seed}'}"
        return replace(episode, seed=seed, actions_sha256=acted if hashed else None)

    episodes = task_with(COUNTS)[side]
    return [results([with_seed(episode, seed) for episode in episodes], seed=seed) for seed in seeds]


@pytest.mark.parametrize("hashed", [True, False], ids=["equal actions", "actions not recorded"])
@pytest.mark.parametrize("acts_alike", [True, False], ids=["copies", "equal outcomes"])
def test_three_seeds_of_one_outcome_say_what_one_says(hashed: bool, acts_alike: bool) -> None:
    once = compare(evaluations(0, (7,)), evaluations(1, (7,)), ("A", "B"))
    thrice = compare(*(evaluations(side, (7, 8, 9), hashed, acts_alike) for side in (0, 1)), ("A", "B"))
    assert once.overall.p_value == stats.binomtest(12, 17).pvalue and round(once.overall.p_value, 2) == 0.14
    assert round(stats.binomtest(36, 51).pvalue, 3) == 0.005, "what 150 trials would say"
    assert not once.distinguishable and not thrice.distinguishable
    for part in ("p_value", "rates", "difference", "interval", "wilson", "states", "effective_trials"):
        assert getattr(thrice.overall, part) == getattr(once.overall, part), part
    copies = hashed and acts_alike
    assert thrice.pairing.counted == (50 if copies else 150)
    if copies:
        assert thrice.verdict == once.verdict
        assert thrice.warnings == (
            "A and B: with another seed 100 of 150 rollouts only repeat one of the same initial state, action for "
            "action (the task samples no fixture); they count once",
        )
    else:
        assert "of the same 50 initial states (150 episodes, with several seeds)" in thrice.verdict
        assert (
            thrice.verdict.partition("Were")[2].replace("initial states", "episodes")
            == (once.verdict.partition("Were")[2])
        )
    assert SEEDS_ARE_NO_TRIALS in comparison_table(thrice).notes
    assert SEEDS_ARE_NO_TRIALS not in comparison_table(once).notes


def test_seeds_that_differ_are_averaged_on_their_initial_state() -> None:
    """By hand: two states with three seeds each, and six with one."""
    sides = [task_with((2, 3, 1, 2))[side] for side in (0, 1)]
    more = [[], []]
    for seed, state, outcomes in ((8, 0, (True, False)), (9, 0, (True, False)), (8, 1, (True, False)), (9, 1, (1, 1))):
        for side in (0, 1):
            more[side].append(replace(sides[side][state], seed=seed, success=bool(outcomes[side])))
    found = compare(*([results(sides[side]), results(more[side])] for side in (0, 1)), ("A", "B")).overall
    third = Fraction(1, 3)
    assert found.counts == (3, 6, 1, 2) and found.counts.trials == 12
    assert found.states == (third + 2 * third, 2 * third + third + 3, 1, 2) and found.trials == 8
    assert found.difference == pytest.approx((2 / 3 + 1 / 3 + 3 - 1) / 8)
    assert found.rates == pytest.approx(((1 + 1 + 3) / 8, (1 / 3 + 2 / 3 + 1) / 8))
    assert found.interval == paired_difference_interval(PairedCounts(1, 4, 1, 2))
    # All 2^6 swaps of the states on which the two differ.
    differences = np.array([2, 1, 3, 3, 3, -3])
    signs = np.array(np.meshgrid(*[(-1, 1)] * 6)).reshape(6, -1)
    assert found.p_value == pytest.approx(np.mean(np.abs(differences @ signs) >= abs(differences.sum())))


def test_the_same_rollouts_on_both_sides_are_no_comparison() -> None:
    ours = evaluations(0, (7,))
    with pytest.raises(
        ValueError, match="A and B are the same rollouts: in all 50 episodes that both have every action"
    ):
        compare(ours, evaluations(0, (7,)), ("A", "B"))
    theirs = evaluations(1, (7, 8), acts_alike=False)
    mixed = [*evaluations(0, (7,), acts_alike=False), theirs[1]]
    found = compare(mixed, theirs, ("A", "B"))
    assert found.pairing.counted == 50 and found.overall.counts == COUNTS
    assert found.warnings == (
        "A and B have the same rollouts of 50 episodes (equal seeds and actions), one a copy of the other; these are "
        "left out",
    )


def test_policies_that_act_alike_on_some_episodes_are_compared_on_all() -> None:
    """As where a pruner's minimum of tokens is in force in some episodes only."""
    first, second = evaluations(0, (7,))[0], evaluations(1, (7,))[0]
    for number in range(20):  # both solve these
        second.episodes[number].actions_sha256 = first.episodes[number].actions_sha256
    found = compare([first], [second], ("A", "B"))
    assert found.overall.counts == COUNTS
    assert found.warnings == ("A and B took the very same actions on 20 episodes",)


def test_a_rollout_that_was_given_twice_counts_once() -> None:
    found = compare(evaluations(0, (7, 7)), evaluations(1, (7,)), ("A", "B"))
    assert found.overall.counts == COUNTS
    assert found.warnings == ("A: 50 rollouts were given twice (equal episodes, seeds and actions) and count once",)


def test_a_table_of_seeds_rests_on_initial_states() -> None:
    once = policies_table({"A": evaluations(0, (7,)), "B": evaluations(1, (7,))})
    assert SEEDS_ARE_NO_TRIALS not in once.notes
    for acts_alike in (True, False):
        table = policies_table({"A": evaluations(0, (7, 8, 9), True, acts_alike), "B": evaluations(1, (7,))})
        assert table.rows == once.rows and table.records[0]["initial_states"] == 50
        copies = "Mind: A: with another seed 100 of 150 rollouts only repeat one of the same initial state"
        assert any(note.startswith(copies) for note in table.notes) == acts_alike
        assert (SEEDS_ARE_NO_TRIALS in table.notes) != acts_alike


def test_copies_under_two_names_are_left_out() -> None:
    ours, theirs = evaluations(0, (7,)), evaluations(1, (8,))
    table = policies_table({"A": ours, "B": [*evaluations(0, (7,)), *theirs]})
    assert table.rows[1][1:] == policies_table({"B": theirs}).rows[0][1:]
    assert table.notes[-1] == (
        "Mind: B: 50 rollouts are copies of those of A (equal episodes, seeds and actions) and are left out."
    )
