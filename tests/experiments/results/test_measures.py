"""How long and how smoothly two policies solve what both solve."""

from experiments.robot.libero.comparison.compare import compare
from experiments.robot.libero.comparison.tables import comparison_table
from experiments.robot.libero.results.measures import motion_sentence
from experiments.robot.libero.results.results import EpisodeRecord, Results


def episodes(steps: dict[int, int | None], jerk: float | None = None) -> list[EpisodeRecord]:
    """A rollout per initial state: its steps where it succeeded, None where it failed."""
    return [
        EpisodeRecord(
            "libero_goal",
            1,
            "do_it",
            "do it",
            state,
            state,
            7,
            success=taken is not None,
            steps=taken or 300,
            jerk=jerk,
        )
        for state, taken in steps.items()
    ]


def test_only_what_both_solved_is_compared() -> None:
    """Of five episodes both solve two: 100 and 140 steps against 160 and 180; the others took no time at all."""
    first = episodes({0: 100, 1: 140, 2: 1, 3: None, 4: None}, jerk=2.0)
    second = episodes({0: 160, 1: 180, 2: None, 3: 1, 4: None}, jerk=5.0)
    table = comparison_table(compare([Results(episodes=first)], [Results(episodes=second)], ("quick", "slow")))
    expected = "On the 2 episodes that both solved, steps to success: quick 120 (6.0 s), slow 170 (8.5 s)"
    assert f"{expected}; jerk: quick 2.0, slow 5.0 m/s³." in table.notes
    plain = motion_sentence(list(zip(episodes({0: 100}), episodes({0: 160}), strict=True)), ("a", "b"))
    assert plain == "On the 1 episode that both solved, steps to success: a 100 (5.0 s), b 160 (8.0 s)."
    assert motion_sentence(list(zip(episodes({0: 9}), episodes({0: None}), strict=True)), ("a", "b")) == ""
