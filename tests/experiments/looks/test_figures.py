"""Shares against chance and paired success, by counts whose answers are known."""

import dataclasses

import numpy as np
import pytest

from experiments.robot.libero.looks.classes import BACKGROUND, CLASSES, GRIPPER, TARGET
from experiments.robot.libero.looks.counts import Counts, Rollout
from experiments.robot.libero.looks.figures import against_chance, all_blanked
from experiments.robot.libero.looks.phases import CARRY, GRASP, PLACE, REACH, Carried
from experiments.robot.libero.looks.pictures import COLOURS, SIZE, moments, view
from experiments.robot.libero.looks.seen import Seen
from experiments.robot.libero.looks.tables import far_table, put_table, sentence


def counts(on_target: float, by_chance: float, kept: int = 100) -> Counts:
    rest = dict.fromkeys(CLASSES, 0.0)
    return Counts(
        queries=10,
        kept=kept,
        tokens=1000,
        on={**rest, "target": on_target, "background": kept - on_target},
        chance={**rest, "target": by_chance, "background": kept - by_chance},
        majority={**dict.fromkeys(CLASSES, 0), "background": kept},
    )


def rollout(
    state: int, success: bool = True, condition: str = "unblanked", task: int = 8, of: Counts | None = None
) -> Rollout:
    lost = 0 if condition == "unblanked" else 30
    return Rollout(
        condition=condition, suite="libero_goal", task=task, task_name="put", instruction="put", names=[("a", "b")],
        state=state, round=0, success=success, steps=80, queries=10, kept=100, blanked=lost,
        of={"full_image": {"reach": of or counts(10, 5)}},
    )  # fmt: skip


def test_shares_chance_and_ratio_are_of_all_tokens_together() -> None:
    rollouts = [rollout(30, of=counts(10, 5)), rollout(31, of=counts(60, 10, 200)), rollout(32, of=counts(5, 5))]
    found = against_chance(rollouts, Rollout.counts, "target")
    assert found is not None and found.ratio is not None
    np.testing.assert_allclose([found.share, found.chance, found.ratio], [75 / 400, 20 / 400, 75 / 20])
    assert found.ratio_interval is not None and found.ratio_interval.low < found.ratio < found.ratio_interval.high
    assert found.ratio_interval.low >= 1.0 and found.ratio_interval.high <= 6.0  # of one state alone
    never = against_chance(rollouts, Rollout.counts, "arm")
    assert never is not None and never.ratio is None and never.share == 0


def test_rollouts_of_one_initial_state_are_one_cluster() -> None:
    one = [rollout(30, of=counts(10, 5)), rollout(30, of=counts(60, 10, 200))]
    found = against_chance(one, Rollout.counts, "target")
    assert found is not None and found.share_interval is None and found.ratio_interval is None


def test_nothing_kept_is_no_share() -> None:
    assert against_chance([rollout(30)], lambda r: r.counts(phases=["carry"]), "target") is None


@pytest.mark.parametrize(
    ("solved", "words"),
    [
        (lambda state: False, "success falls"),
        (lambda state: True, "success stays"),
        (lambda state: state != 30, "neither is shown"),
    ],
)
def test_blanked_rollouts_are_paired_with_the_same_starts(solved: object, words: str) -> None:
    states = range(30, 70) if words != "neither is shown" else range(30, 34)
    plain = [rollout(state) for state in states]
    other = [rollout(state, solved(state), "background") for state in [*states, 99]]  # type: ignore[operator]
    (found,) = all_blanked([*plain, *other])
    assert found.condition == "background" and found.counts.trials == len(states)
    assert (found.tokens, found.kept) == (3.0, 10.0)
    assert words in sentence(found)
    assert ("sinks" in sentence(found)) == (words == "success stays")
    assert not all_blanked(plain)


def test_p_is_corrected_over_the_questions_that_were_asked() -> None:
    """Six states lost of six: 2 in 64 for one question, and no evidence any more for four.

    A fifth is whether the target's cost more than others, and five p-values are corrected.
    """
    plain = [rollout(state) for state in range(30, 36)]
    asked = [
        rollout(state, False, kind) for kind in ("target", "goal", "background", "random") for state in range(30, 36)
    ]
    (one,) = all_blanked([*plain, *asked[:6]])
    assert (one.p_value, one.corrected_p, one.falls) == (1 / 32, 1 / 32, True)
    four = all_blanked([*plain, *asked])
    assert [(each.corrected_p, each.falls) for each in four] == [(5 / 32, False)] * 4
    assert four[0].beyond_random == (0.0, 1.0) and four[1].beyond_random is None


def test_use_is_told_from_disturbance_by_as_many_random_others() -> None:
    plain = [rollout(state) for state in range(30, 50)]
    target = [rollout(state, False, "target") for state in range(30, 50)]
    spared, harmed = ([rollout(state, solved, "random") for state in range(30, 50)] for solved in (True, False))
    said = [sentence(all_blanked([*plain, *target, *more])[0]) for more in (spared, harmed, [])]
    assert "The policy uses what these tokens show (-100.0 points against as many random others" in said[0]
    assert "Whether it uses what they show, or is disturbed by mean tokens, is not told" in said[1]
    assert "`--blank random` would tell" in said[2]


def test_how_far_rollouts_came_and_where_they_put_it() -> None:
    came = [
        (True, Carried(held=True, at_end=True, apart=(0.01, -0.01))),
        (True, Carried(held=True, at_end=False, apart=(-0.03, 0.0))),
        (False, Carried(held=False, at_end=False, apart=None)),
        (False, Carried(held=True, at_end=False, apart=None)),
        (False, Carried(held=True, at_end=False, apart=(0.3, 0.0))),
        (False, Carried(held=True, at_end=False, apart=(0.05, 0.0))),
        (False, Carried(held=True, at_end=True, apart=(0.2, 0.2))),
    ]
    rollouts = [
        dataclasses.replace(rollout(30 + number, success), carried=[carried])
        for number, (success, carried) in enumerate(came)
    ]
    kept = [Rollout.from_json(each.to_json()) for each in rollouts]
    assert kept == rollouts
    far, put = far_table(kept), put_table(kept)
    assert far is not None and far.rows == [("a to b", "2 of 7", "1", "1", "1", "1", "1")]
    assert put is not None and put.rows == [("a to b", "3", "+1.0 (3.3)", "-0.3 (0.5)", "3.0", "5.0")]


def test_a_drawer_is_carried_nowhere() -> None:
    drawer = dataclasses.replace(rollout(30), carried=[None])
    assert far_table([drawer]) is None and put_table([drawer]) is None
    assert far_table([rollout(30)]) is None  # of a file of before it was noted


def test_a_moment_of_every_phase_is_shown() -> None:
    phases = np.array([REACH] * 9 + [GRASP] * 2 + [CARRY] * 6 + [PLACE])
    chosen = moments(phases)
    assert len(chosen) == 6 and chosen == sorted(chosen)
    assert {phases[query] for query in chosen} == {REACH, GRASP, CARRY, PLACE}
    assert moments(np.array([REACH, REACH])) == [0, 1]


def test_kept_patches_stay_bright_and_classes_are_outlined() -> None:
    classes = np.full((1, 70, 70), BACKGROUND, np.uint8)
    classes[0, 35:50, 35:50], classes[0, :10, :10] = TARGET, GRIPPER
    picture = np.full((1, 70, 70, 3), 200, np.uint8)
    kept = np.zeros((1, 49), bool)
    kept[0, 6] = True  # at the right end of the first row
    none = np.zeros((1, 49, len(CLASSES)), np.int64)
    seen = Seen(("full_image",), [("a", "b")], np.zeros(1), np.zeros(1), kept, ~kept, none, [picture], [classes])
    found = view(seen, 0, 0, center_crop=False)
    side = SIZE // 7
    assert (found[2 : side - 2, -side + 2 :] == 200).all()
    assert found[SIZE - 5, 5].max() < 100
    for kind in (TARGET, GRIPPER):
        assert (found == COLOURS[kind]).all(axis=2).sum() > 30
