"""Success and tokens against training steps, against counting one by one."""

from pathlib import Path

import numpy as np
import pytest
from study_files import changed, check_numbers, keep, table, write_study

from lightvla.study.places import Places
from lightvla.study.records import load_all
from lightvla.study.telling.checkpoints import measured_steps
from lightvla.study.telling.report import write_reports
from lightvla.study.variants import load_variants


def made(folder: Path, seeds: tuple[int, ...] = (7, 11)) -> Places:
    content = changed("arms.1.checkpoints", [1, 2])
    content["training"]["seeds"] = list(seeds)
    content["scenes"][0]["checkpoint_trials_per_task"] = 6
    places = write_study(folder, content)
    keep(places, "none", lambda *_: True)
    keep(places, "lightvla", final, 17.0)
    keep(places, "lightvla", lambda *_: False, 60.0, variant="step1", trials=6)
    keep(places, "lightvla", halfway, 30.0, variant="step2", trials=6)
    return places


def final(seed: int, task: int, state: int, round_: int) -> bool:
    return (seed + state + round_) % 4 > 0


def halfway(seed: int, task: int, state: int, round_: int) -> bool:
    return task == 1 and state != 31


def test_every_step_is_counted_on_the_same_starts(tmp_path: Path) -> None:
    places = made(tmp_path)
    study = keep(places, "none", lambda *_: True)
    results, _ = load_all(study, places)
    beside, missing = load_variants(study, places)
    assert not missing and len(beside) == 4 and all(not result.variant for result in results)
    found = measured_steps(study.arm("lightvla"), 3, results, beside)
    starts = [(s, t, 30 + trial % 5, trial // 5) for s in (7, 11) for t in (1, 4) for trial in range(6)]
    assert [each.step for each in found] == [1, 2, 3] and {each.trials for each in found} == {24}
    for each, solved in zip(found, (lambda *_: False, halfway, final), strict=True):
        outcomes = [solved(*start) for start in starts]
        assert each.successes == sum(outcomes) and each.rate[0] == pytest.approx(np.mean(outcomes))
        assert each.rate[1].low <= each.rate[0] <= each.rate[1].high and each.rate[1].high > each.rate[1].low
    assert [each.tokens[0] for each in found] == pytest.approx([60, 30, 17])


def test_tokens_vary_over_initial_states(tmp_path: Path) -> None:
    places = made(tmp_path, seeds=(7,))
    study = keep(places, "none", lambda *_: True)
    beside, _ = load_variants(study, places)
    for result in beside:
        result.rollouts = [
            type(rollout)(**{**vars(rollout), "tokens": float(rollout.state), "queries": 1 + rollout.round})
            for rollout in result.rollouts
        ]
    first = measured_steps(study.arm("lightvla"), 3, [], beside)[0]
    # Of each task state 30 was tried twice, the second time with two queries.
    assert first.tokens[0] == pytest.approx((3 * 30 + 31 + 32 + 33 + 34) / 7)
    assert 30 <= first.tokens[1].low < first.tokens[0] < first.tokens[1].high <= 34


def test_the_report_has_the_curve_and_compares_nothing_with_it(tmp_path: Path) -> None:
    places = made(tmp_path)
    study = keep(places, "none", lambda *_: True)
    write_reports(study, places)
    check_numbers(places)
    text, page = ((places.root / name).read_text() for name in ("report.md", "report.html"))
    rows = table(text, "Checkpoints")
    assert list(rows) == ["lightvla, step 1", "lightvla, step 2", "lightvla, step 3"]
    assert rows["lightvla, step 2"][0].startswith("10/24") and rows["lightvla, step 2"][2] == "30.0 (30.0 to 30.0)"
    assert "lightvla behind 1, 2 steps, 6 rollouts a task" in text
    assert "training step" in page and "Success over training steps. lightvla: 0 at step 1, 0.417 at step 2" in page
    compared = table(text, "Paired difference to none")
    for step in (1, 2):
        for seed in study.training.seeds:
            places.result(study, "goal", "lightvla", seed, f"step{step}").unlink()
    write_reports(study, places)
    text = (places.root / "report.md").read_text()
    assert table(text, "Paired difference to none") == compared, "checkpoints are no arms"
    assert "grid, blind, lightvla@step1, lightvla@step2 (seeds 7 and 11)" in text
    assert "### Checkpoints" not in text
