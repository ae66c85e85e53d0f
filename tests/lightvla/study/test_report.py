"""The report says what the kept results say, number by number, and every arm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study_files import changed, check_numbers, keep, keep_benchmark, write_study

from lightvla.study.definition import read_study
from lightvla.study.flags import study_parser
from lightvla.study.places import Places
from lightvla.study.records import ArmResult, check_unchanged, fix, load_all
from lightvla.study.run import command
from lightvla.study.telling.figures import arm_figures
from lightvla.study.telling.report import write_reports

ROOT = Path(__file__).resolve().parents[3]
REPORTED = sorted(path.parent for path in (ROOT / "studies").glob("*/report.md"))


def made(folder: Path) -> Places:
    places = write_study(folder)
    keep(places, "none", lambda seed, task, state, round_: state != 30, curve=True)
    keep(places, "lightvla", lambda seed, task, state, round_: (seed + state + round_) % 4 > 0, 17.0, curve=True)
    keep(places, "grid", lambda seed, task, state, round_: task == 1, 17.0)
    study = keep(places, "blind", lambda *_: False, 17.0)
    keep_benchmark(places, study)
    return places


def test_tables_are_made_again_from_what_is_kept(tmp_path: Path, capsys) -> None:
    places = made(tmp_path / "s")
    words = ["s", "--studies_dir", str(tmp_path), "--report_only", "True"]
    assert command(study_parser().parse_args(words)) == 0
    check_numbers(places)
    before = [(places.root / name).read_text() for name in ("report.md", "report.html")]
    assert not places.work.exists(), "nothing is run for it"
    assert command(study_parser().parse_args(words)) == 0
    assert [(places.root / name).read_text() for name in ("report.md", "report.html")] == before
    assert "Does it run?" in before[0] and "excluded" in before[0] and "Not run yet" not in before[0]
    assert before[1].count("<svg") == 3, "bars, loss, tokens"


@pytest.mark.skipif(not REPORTED, reason="no study of this repository has been run yet")
@pytest.mark.parametrize("folder", REPORTED, ids=lambda folder: folder.name)
def test_a_report_of_this_repository_is_what_its_results_say(folder: Path) -> None:
    check_numbers(Places(folder))


def test_the_report_says_what_is_missing_and_what_was_changed(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    study = keep(places, "none", lambda *_: True)
    fix(study, places)
    write_reports(study, places)
    text = (tmp_path / "report.md").read_text()
    assert "Not run yet: lightvla, grid, blind (seeds 7 and 11); the benchmark of goal.**" in text
    assert "lightvla and none have not both been run" in text
    assert "| task | none |" in text, "a row for each of two tasks, for one arm was run"
    assert "\n2 training seeds: the intervals" in text
    places.result(study, "goal", "none", 11).unlink()
    write_reports(study, places)
    assert "\n1 of 2 training seeds: the intervals" in (tmp_path / "report.md").read_text()
    keep(places, "none", lambda *_: True)
    write_study(tmp_path, changed("fixed.margin_points", 30))
    other = read_study(places.definition)
    check_unchanged(other, places, force=True)
    write_reports(other, places)
    text = (tmp_path / "report.md").read_text()
    assert "study.yaml was changed after arms had been run (20" in text
    assert (
        "Made by another study.yaml than the present one, and compared among themselves alone: goal, none, seed 7; goal"
        in text
    )


def test_a_study_of_several_scenes_reports_each(tmp_path: Path) -> None:
    content = changed("fixed.margin_points", 10)
    content["scenes"].append({**content["scenes"][0], "name": "second", "tasks": [8]})
    places = write_study(tmp_path, content)
    keep(places, "none", lambda *_: True)
    study = keep(places, "lightvla", lambda *_: True)
    assert (places.results / "goal" / "lightvla-seed7.json").is_file()
    write_reports(study, places)
    text = (tmp_path / "report.md").read_text()
    assert "## Success: goal" in text and "In second, lightvla and none have not both been run." in text


def test_a_result_that_lacks_rollouts_or_is_anothers_is_refused(tmp_path: Path) -> None:
    places = made(tmp_path)
    study = read_study(places.definition)
    path = places.result(study, "goal", "grid", 7)
    result = ArmResult.load(path)
    replace(result, rollouts=result.rollouts[:13]).save(path)
    with pytest.raises(
        ValueError, match="grid-seed7.json holds 13 of 20 rollouts that the definition fixes; restore it"
    ):
        write_reports(study, places)
    for change, said in (({"arm": "blind"}, "arm blind, seed 7"), ({"seed": 11}, "arm grid, seed 11")):
        replace(result, **change).save(path)
        with pytest.raises(
            ValueError, match=f"holds the result of scene goal, {said}; expected scene goal, arm grid, s"
        ):
            write_reports(study, places)


def told(tmp_path: Path, **made_by: dict[str, Any]) -> str:
    """The report where each arm's results say how they were made."""
    places = write_study(tmp_path)
    for arm in ("none", "lightvla", "grid", "blind"):
        study = keep(places, arm, lambda *_: True, 98.0 if arm == "none" else 17.0, **made_by.get(arm, {}))
    keep_benchmark(places, study)
    write_reports(study, places)
    return (tmp_path / "report.md").read_text()


def test_results_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    """An arm that was run again, on another machine say, is another policy's child."""
    alike = {
        "none": {"parent": "p", "weights": "n"}, "lightvla": {"parent": "p", "weights": "l"},
        "grid": {"weights": "n"}, "blind": {"weights": "l"},
    }  # fmt: skip
    assert "Does not belong together" not in told(tmp_path / "alike", **alike)
    text = told(tmp_path / "parents", **{**alike, "lightvla": {"parent": "q", "weights": "l"}})
    assert "seed 7: not all were trained from one parent: none / lightvla; seed 11: not all" in text
    text = told(tmp_path / "weights", **{**alike, "lightvla": {"parent": "p", "weights": "k"}})
    assert "seed 7: blind was measured on another training of lightvla than its result here" in text
    assert "grid was measured" not in text


def test_another_count_than_the_one_that_is_kept_is_told(tmp_path: Path) -> None:
    places = made(tmp_path)
    study = keep(places, "lightvla", lambda *_: True, 18.4)
    write_reports(study, places)
    assert (
        "grid was measured at another number of tokens than the 18.4 of lightvla"
        in (tmp_path / "report.md").read_text()
    )


def test_warnings_of_evaluations_are_told_once(tmp_path: Path) -> None:
    warned = {"warnings": ["the first 20 rollouts were made by other code"]}
    text = told(tmp_path, none=warned, grid=warned)
    said = "none, seed 7; none, seed 11; grid, seed 7; grid, seed 11: the first 20 rollouts were made by other code."
    assert text.count("made by other code") == 1 and said in text


def test_results_of_another_definition_are_compared_with_no_other(tmp_path: Path) -> None:
    """Their starts differ, though they have the same numbers."""
    places = write_study(tmp_path)
    keep(places, "none", lambda *_: True)
    study = keep(places, "lightvla", lambda *_: True, 17.0)
    assert [each.difference is None for each in arm_figures(study, load_all(study, places)[0])] == [True, False]
    write_study(tmp_path, changed("scenes.0.wide_starts_m", 0.08))
    other = keep(places, "lightvla", lambda *_: True, 17.0)
    assert [each.difference is None for each in arm_figures(other, load_all(other, places)[0])] == [True, True]
