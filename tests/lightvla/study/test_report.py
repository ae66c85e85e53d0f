"""The report says what the kept results say, number by number, and every arm."""

from dataclasses import replace
from pathlib import Path

import pytest
from study_files import changed, check_numbers, keep, write_study

from lightvla.study.definition import read_study
from lightvla.study.flags import study_parser
from lightvla.study.places import Places
from lightvla.study.records import ArmResult, check_unchanged, fix
from lightvla.study.run import command
from lightvla.study.telling.report import write_reports

ROOT = Path(__file__).resolve().parents[3]
REPORTED = sorted(path.parent for path in (ROOT / "studies").glob("*/report.md"))


def made(folder: Path) -> Places:
    places = write_study(folder)
    keep(places, "none", lambda seed, task, state, round_: state != 30, curve=True)
    keep(places, "lightvla", lambda seed, task, state, round_: (seed + state + round_) % 4 > 0, 17.0, curve=True)
    keep(places, "grid", lambda seed, task, state, round_: task == 1, 17.0)
    keep(places, "blind", lambda *_: False, 17.0)
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
    assert "Not run yet: goal, lightvla, seed 7; goal, lightvla, seed 11; goal, grid" in text
    assert "lightvla and none have not both been run" in text
    write_study(tmp_path, changed("fixed.margin_points", 30))
    other = read_study(places.definition)
    check_unchanged(other, places, force=True)
    write_reports(other, places)
    text = (tmp_path / "report.md").read_text()
    assert "study.yaml was changed after arms had been run (by --force, " in text
    assert "Made by another study.yaml than the present one: goal, none, seed 7; goal, none, seed 11." in text


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
