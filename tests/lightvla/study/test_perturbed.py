"""What arms solve in perturbed scenes, against counting one by one."""

from pathlib import Path

from study_files import changed, check_numbers, keep, table, write_study

from experiments.robot.libero.comparison.compare import p_text
from lightvla.study.places import Places
from lightvla.study.telling.report import write_reports
from prismatic.significance import mcnemar_exact


def made(folder: Path) -> Places:
    content = changed("scenes.0.perturbations", ["position", "object"])
    content["scenes"][0]["perturbed_arms"] = ["none", "lightvla"]
    places = write_study(folder, content)
    keep(places, "none", lambda *_: True)
    keep(places, "lightvla", lambda *_: True, 17.0)
    keep(places, "none", lambda seed, task, state, round_: state < 34, variant="position")
    keep(places, "lightvla", lambda seed, task, state, round_: state < 32, 20.0, variant="position")
    keep(places, "lightvla", lambda *_: True, 17.0, variant="object")
    return places


def test_each_perturbation_has_its_table_and_no_part_in_the_comparison(tmp_path: Path) -> None:
    places = made(tmp_path)
    study = keep(places, "grid", lambda *_: False)
    write_reports(study, places)
    check_numbers(places)
    text = (places.root / "report.md").read_text()
    moved, other = table(text, "Perturbed: position"), table(text, "Perturbed: object")
    assert list(moved) == ["none", "lightvla"] and list(other) == ["lightvla"]
    assert moved["none"][0].startswith("32/40") and moved["none"][2:] == ["100.0", "98.0 of 98", "–", "–", "–"]
    assert moved["lightvla"][0].startswith("16/40") and moved["lightvla"][2:5] == ["100.0", "20.0 of 98", "-40.0"]
    # Of both tasks two states of five, each with all its rounds and seeds.
    assert moved["lightvla"][6] == p_text(mcnemar_exact(0, 4))
    assert other["lightvla"][4:] == ["–", "–", "–"], "none has not been measured so yet"
    assert "Not run yet: blind, none@object (seeds 7 and 11); " in text
    assert "position, object: none, lightvla" in text
    compared, success = table(text, "Paired difference to none"), table(text, "Every arm")
    for path in places.results.glob("*@*"):
        path.unlink()
    write_reports(study, places)
    text = (places.root / "report.md").read_text()
    assert (table(text, "Paired difference to none"), table(text, "Every arm")) == (compared, success)
    assert "### Perturbed" not in text
