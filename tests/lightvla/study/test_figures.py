"""Numbers and verdicts of results that were made by hand, against counting one by one."""

from pathlib import Path

import numpy as np
import pytest
from study_files import changed, keep, write_study

from lightvla.study.definition import read_study
from lightvla.study.records import ArmResult, load_all
from lightvla.study.telling.figures import arm_figures, difference_of, primary_answers
from prismatic.clustered_trials import clustered_difference
from prismatic.significance import mcnemar_exact, wilson_interval


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    study = keep(places, "lightvla", lambda seed, task, state, round_: state > 31, tokens=17.25, curve=True)
    path = places.result(study, "goal", "lightvla", 7)
    result = ArmResult.load(path)
    assert len(result.rollouts) == 20 and result.tokens_kept == pytest.approx(17.25)
    before = path.read_bytes()
    result.save(path)
    assert path.read_bytes() == before
    assert len(before.splitlines()) > 20 and b"[1, 30, 0, false, 100, 17.25, 10, 7.0]" in before
    text = path.read_text()
    path.write_text(text.replace("[1, 30, 1, ", "[1, 30, 0, "))
    with pytest.raises(ValueError, match="holds a rollout twice, and a copy is no trial"):
        ArmResult.load(path)
    path.write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="is no result of a study"):
        ArmResult.load(path)


def test_rates_and_differences_are_what_counting_gives(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    baseline = lambda seed, task, state, round_: state != 30 or round_ == 1  # noqa: E731
    arm = lambda seed, task, state, round_: task == 1 or (state + seed) % 3 > 0  # noqa: E731
    keep(places, "none", baseline)
    study = keep(places, "lightvla", arm, tokens=17.0)
    results, missing = load_all(study, places)
    assert missing == [("goal", arm, seed) for arm in ("grid", "blind") for seed in (7, 11)]
    none, pruned = arm_figures(study, results)
    trials = [(s, t, 30 + i, r) for s in (7, 11) for t in (1, 4) for i in range(5) for r in (0, 1)]
    for figures, solved in ((none, baseline), (pruned, arm)):
        outcomes = [solved(*trial) for trial in trials]
        assert (figures.successes, figures.trials) == (sum(outcomes), 40)
        assert figures.wilson == wilson_interval(sum(outcomes), 40)
        assert figures.rate == pytest.approx(np.mean(outcomes))
        for task in (1, 4):
            own = [solved(*trial) for trial in trials if trial[1] == task]
            assert figures.by_task[task] == (sum(own), len(own))
        for seed in (7, 11):
            own = [solved(*trial) for trial in trials if trial[0] == seed]
            assert figures.by_seed[seed] == (sum(own), len(own))
        steps = [100 + i + 5 * r for (s, t, state, r) in trials for i in [state - 30] if solved(s, t, state, r)]
        assert figures.steps == pytest.approx(np.mean(steps))
    assert none.difference is None and pruned.token_share == pytest.approx(17 / 98)
    found = pruned.difference
    assert found is not None and found.states == 10
    pairs = [(arm(*trial), baseline(*trial)) for trial in trials]
    cells = [(True, True), (True, False), (False, True), (False, False)]
    assert tuple(found.counts) == tuple(pairs.count(cell) for cell in cells)
    assert found.value == pytest.approx(pruned.rate - none.rate)
    # Both rounds of both seeds of a state are a cluster.
    clusters = [
        [[pair for pair, (_, t, at, _) in zip(pairs, trials, strict=True) if (t, at) == (task, state)]
         for state in range(30, 35)]
        for task in (1, 4)
    ]  # fmt: skip
    assert all(len(cluster) == 4 for task in clusters for cluster in task)
    assert found.interval == pytest.approx(clustered_difference(clusters)[1])


def test_rounds_and_seeds_of_a_state_are_one_cluster(tmp_path: Path) -> None:
    """Where all rollouts of a state are alike, repeating them makes nothing surer."""
    intervals = []
    for name, trials in (("once", 5), ("again", 10)):
        places = write_study(tmp_path / name, changed("scenes.0.trials_per_task", trials))
        study = keep(places, "lightvla", lambda seed, task, state, round_: state > 31)
        [figures] = arm_figures(study, load_all(study, places)[0])
        intervals.append(figures.clustered)
        wilson = figures.wilson
    assert intervals[0] == intervals[1]
    assert wilson.high - wilson.low < intervals[1].high - intervals[1].low


@pytest.mark.parametrize(
    ("lost", "solved", "answer", "words"),
    [
        (32, lambda *_: True, "non-inferior", "lightvla at 17.3 % of the tokens is non-inferior to"),
        (30, lambda *_: False, "inferior", "is worse than none by more than the margin"),
        (30, lambda seed, task, state, _: state > 31, "not shown", "it is not shown that lightvla at 17.3 % of the"),
    ],
)
def test_the_primary_answer(lost: int, solved, answer: str, words: str, tmp_path: Path) -> None:
    places = write_study(tmp_path)
    keep(places, "none", lambda seed, task, state, round_: state > lost)
    study = keep(places, "lightvla", solved, tokens=17.0)
    results, _ = load_all(study, places)
    [found] = primary_answers(study, results)
    assert found.answer == answer and words in found.sentence and "margin -10" in found.sentence
    assert "over 10 initial states" in found.sentence


def test_no_certainty_where_all_outcomes_are_alike(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    keep(places, "none", lambda *_: True)
    study = keep(places, "lightvla", lambda *_: True)
    none, pruned = arm_figures(study, load_all(study, places)[0])
    assert none.clustered == wilson_interval(10, 10)
    assert pruned.difference is not None
    low, high = pruned.difference.interval
    assert low < -0.1 < 0.1 < high and pruned.difference.verdict == "not distinguishable"
    [found] = primary_answers(study, load_all(study, places)[0])
    assert found.answer == "not shown", "ten states that agree do not show it"


def test_verdicts_are_corrected_for_how_many_arms_there_are(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    keep(places, "none", lambda *_: True)
    keep(places, "lightvla", lambda *_: True)
    study = keep(places, "blind", lambda *_: False)
    [alone] = [each.difference for each in arm_figures(study, load_all(study, places)[0]) if each.arm == "blind"]
    assert alone is not None and alone.corrected_p == pytest.approx(3 * alone.p_value), "grid, not run yet, counts"
    study = keep(places, "grid", lambda seed, task, state, round_: task == 1 or state == 30)
    figures = {each.arm: each.difference for each in arm_figures(study, load_all(study, places)[0])}
    blind, grid = figures["blind"], figures["grid"]
    assert blind is not None and grid is not None
    assert blind.p_value == mcnemar_exact(0, 10) and blind.corrected_p == pytest.approx(3 * blind.p_value)
    assert grid.p_value == mcnemar_exact(0, 4) and grid.corrected_p == pytest.approx(2 * grid.p_value)
    assert (blind.verdict, grid.verdict) == ("worse", "not distinguishable")


def test_only_the_same_training_seed_pairs(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    keep(places, "none", lambda *_: True)
    study = keep(places, "lightvla", lambda *_: True)
    results, _ = load_all(study, places)
    first = [r for r in results if r.arm == "lightvla" and r.seed == 7]
    second = [r for r in results if r.arm == "none" and r.seed == 11]
    assert difference_of(first, second) is None
    assert read_study(places.definition).sha256 == study.sha256
