"""The report of evaluations, from results files with real videos and pictures beside them."""

import base64
import re
from pathlib import Path

import pytest
from report_page import EVIL, Page
from report_results import data_of, episode, save, tables, texts
from scipy import stats

from experiments.robot.libero.evaluation.command import report_line
from experiments.robot.libero.reports.evaluation import load_evaluations, short_names
from experiments.robot.libero.reports.page import write_reports
from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.results.results import FILE_NAME
from prismatic.report.data import Table


def test_the_page_tells_the_evaluation(tmp_path: Path, video: Path) -> None:
    episodes = [episode(1, 0, True), episode(1, 1, False), episode(4, 0, True, attempts=3), episode(4, 1, None)]
    folder = save(tmp_path / "run", episodes, video)
    html, markdown = write_reports([folder])
    assert (html, markdown) == (folder / "report.html", folder / "report.md")
    page = Page(html.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    low, high = (100 * edge for edge in stats.binomtest(2, 3).proportion_ci(0.95, method="wilson"))
    for words in (f"67 %, 95 % interval {low:.0f} to {high:.0f}", "1.7 million parameters", "within 6 cm", "10.0 of 98",
                  "15.0 ms", "two images are read", "--note 'a b'", "ValueError: the bowl fell",
                  "1 of 4 rollouts of run ended",
                  "from wide starts (LIBERO's own initial states, goal's", "begun 3 times", "mujoco"):  # fmt: skip
        assert words in text
        assert words in re.sub(r"\\(.)", r"\1", markdown.read_text(encoding="utf-8"))
    assert "Incomplete" not in text and "Control:" not in text
    headings = [title for title in page.text if title in ("Success", "Failures", "Errors", "Successes", "All rollouts")]
    assert headings[5:] == [
        "Success",
        "Failures",
        "Errors",
        "Successes",
        "All rollouts",
    ]  # behind those of the contents
    assert all(address.startswith(("data:", "#", "videos/")) for address in page.addresses)
    assert [tag for tag, _ in page.tags].count("video") == 3


def test_failures_come_first_without_any_clip(tmp_path: Path, video: Path) -> None:
    episodes = [episode(1, 0, True), episode(1, 1, False), episode(4, 0, False)]
    lost = save(tmp_path / "lost", episodes, video)
    for file in (lost / "videos").iterdir():
        file.unlink()
    never = save(tmp_path / "never", [episode(1, 0, True), episode(1, 1, False)])
    page, markdown = (path.read_text(encoding="utf-8") for path in write_reports([lost]))
    assert "<video" not in page and "0 of 2 with a clip. The video files of 2 are not where" in page
    headings = re.findall(r"<h2[^>]*>([^<]+)", page)
    assert headings[:2] == ["Success", "Failures"] and re.findall(r"^## (.+)", markdown, re.M) == headings
    assert "Successes" in headings and "0 of 1 with a clip" in page
    sections = {section.title: section for section in data_of(lost, never).filled}
    (table,) = sections["Failures"].blocks
    assert isinstance(table, Table) and [row[1:4] + row[-1:] for row in texts(table)] == [
        ["lost", "1", "1", "file is missing"], ["lost", "0", "0", "file is missing"], ["never", "1", "1", "not filmed"]
    ]  # fmt: skip
    titles = [section.title for section in data_of(never).filled]
    assert "Failures" in titles and "Successes" not in titles
    assert "Failures" not in [
        section.title for section in data_of(save(tmp_path / "all", [episode(1, 0, True)])).filled
    ]


@pytest.mark.parametrize("name", ["{secret}", "../secret.mp4", "key", "videos/link.mp4"])
def test_a_report_holds_no_file_from_elsewhere(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.mp4"
    content = b"nobody else may read this"
    folder = save(tmp_path / "run", [])
    (folder / "videos").mkdir()
    for path in (secret, secret.with_suffix(".png"), folder / "key"):
        path.write_bytes(content)
    (folder / "videos" / "link.mp4").symlink_to(secret)
    save(folder, [episode(1, 0, False, video=name.format(secret=secret))])
    for path in write_reports([folder]):
        text = path.read_text(encoding="utf-8")
        assert base64.b64encode(content).decode() not in text and "secret" not in text and "link.mp4" not in text
        assert "are no videos of this evaluation" in text


def test_a_picture_beside_a_clip_is_taken_from_the_folder_only(tmp_path: Path, video: Path) -> None:
    folder = save(tmp_path / "run", [episode(1, 0, False)], video)
    picture = folder / "videos" / "task1 trial0.png"
    picture.replace(tmp_path / "secret.png")
    picture.symlink_to(tmp_path / "secret.png")
    (clip,) = (block for section in data_of(folder).sections for block in section.blocks if block.kind == "clip")
    assert clip.picture is None


def test_an_incomplete_run_and_a_control_say_so_first(tmp_path: Path) -> None:
    run = save(tmp_path / "a", [episode(1, 0, True)], run={"complete": False})
    blank = save(tmp_path / "b", [episode(1, 0, False)], config={"control": "blank_images"})
    data = data_of(run, blank)
    assert data.alerts[0].startswith("Incomplete: a ") and "of the 1 rollout that" in data.alerts[0]
    assert data.alerts[1].startswith("Control (blank images): in b, the policy saw mid-grey")
    part = save(tmp_path / "part", [episode(1, 0, True)], run={"warnings": ["w"]}, config={"shard": "2/4"})
    assert data_of(part).alerts == ["Mind: part: this is shard 2/4 of the rollouts.", "Mind: part: w."]
    empty = data_of(save(tmp_path / "c", [], run={"complete": False}))
    assert empty.alerts and "no valid rollout" in empty.headlines[0].label


def test_several_evaluations_have_a_column_each(tmp_path: Path) -> None:
    first = save(tmp_path / "first", [episode(1, 0, True), episode(1, 1, False), episode(4, 0, True)])
    swapped = [episode(1, t, False, other_task=4, other_success=t > 0, instruction="do that") for t in range(3)]
    second = save(tmp_path / "second", swapped, config={"control": "swapped_instruction"})
    table = tables(data_of(first, second))["Tasks"]
    label = "second (control: swapped instruction)"
    assert list(table.columns) == ["task", "first", f"{label}: own goal", f"{label}: the instructed goal"]
    counts = [[text.split(" ")[0] for text in row[1:]] for row in texts(table)]
    assert counts == [["1/2", "0/3", "2/3"], ["1/1", "–", "–"], ["2/3", "0/3", "2/3"]]
    html, _ = write_reports([first, second])
    assert html.parent == tmp_path  # the folder that holds both
    assert "nstruction “do that”" not in html.read_text()  # said where there is a clip


def test_a_server_s_own_words_about_its_policy_do_not_break_the_report(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", [episode(1, 0, True)], policy={"parameters": "nan", "checkpoint": "theirs"})
    assert "theirs (pruner lightvla) solved 1 of 1" in write_reports([folder])[0].read_text(encoding="utf-8")


def test_foreign_words_stay_words(tmp_path: Path) -> None:
    record = episode(1, 0, None, task_name=EVIL, invalid=f"Traceback\n{EVIL}")
    folder = save(tmp_path / "run", [record, episode(4, 0, True)], policy={"checkpoint": EVIL, "assumptions": [EVIL]})
    page = Page(write_reports([folder])[0].read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert " ".join(page.text).count("<script>alert('x')</script>") >= 4


def test_protocol_and_commands(tmp_path: Path) -> None:
    protocol = {"name": "lerobot", "max_steps": 300, "seeding": "seed + trial", "deviations": ["--seed 7: 1000", "x"]}
    found = tables(data_of(save(tmp_path / "run", [episode(1, 0, True)], run={"protocol": protocol})))
    facts = dict(texts(found["What was done"]))
    assert (facts["settle steps"], facts["cap on control steps"], facts["seed"]) == ("10", "300", "7")
    assert (facts["open-loop steps of a chunk"], facts["seeding"]) == ("8", "seed + trial")
    assert (facts["protocol"], facts["deviations from it"]) == ("lerobot", "--seed 7: 1000; x")
    assert dict(texts(found["Versions"])) == collect_versions()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"wide_starts_m": 0.0}, "LIBERO's own initial states"),
        ({"wide_starts_m": 0.06}, "wide starts (LIBERO's own initial states, goal's objects moved within 6 cm)"),
        ({"wide_starts_m": None, "initial_states_path": "a/b.json"}, "the initial states of the file b.json"),
        (
            {"wide_starts_m": 0.0, "task_suite_name": "libero_goal_swap"},
            "LIBERO-PRO's initial states (perturbation: position)",
        ),
        ({"wide_starts_m": None, "task_suite_name": "somebody_s"}, "LIBERO's own initial states"),
    ],
)
def test_starts_are_named(tmp_path: Path, config: dict, words: str) -> None:
    data = data_of(save(tmp_path / "run", [episode(1, 0, True)], config=config))
    assert f"over 1 task of {config.get('task_suite_name', 'libero_goal')} from {words}, in" in data.summary[0]
    assert "solved 1 of 1 rollout (" in data.summary[0]
    assert dict(texts(tables(data)["What was done"]))["initial states"] == words


def test_initial_states_are_those_of_the_rollouts_not_those_that_were_asked_for(tmp_path: Path) -> None:
    asked = {"num_trials_per_task": 50, "initial_states_path": "b.json"}
    starts = [(1, 3), (1, 4), (1, 5), (1, 9), (4, 3), (4, 4)]
    for pairs, words in ((starts, "3-5, 9 (2 to 4 per task)"), (starts[:1], "3 (1 per task)"), ([], "none yet")):
        episodes = [episode(task, state, True, initial_state=state) for task, state in pairs]
        found = tables(data_of(save(tmp_path / "run", episodes, config=asked)))["What was done"]
        assert dict(texts(found))["their numbers"] == words


def test_names_are_as_long_as_it_takes() -> None:
    folders = [Path("/x/seed7/wide"), Path("/x/seed8/wide"), Path("/x/seed8/blank")]
    assert short_names(folders[1:]) == ["wide", "blank"]
    assert short_names(folders) == ["seed7/wide", "seed8/wide", "seed8/blank"]


def test_two_files_of_one_folder_are_two_evaluations(tmp_path: Path) -> None:
    folder = save(tmp_path / "w", [episode(1, 0, True)])
    save(tmp_path / "old", [episode(1, 0, False)])
    (tmp_path / "old" / FILE_NAME).rename(folder / "old.json")
    other = save(tmp_path / "v", [episode(1, 0, True)])
    evaluations = load_evaluations([folder, folder / "old.json", other])
    assert [evaluation.name for evaluation in evaluations] == [FILE_NAME, "old.json", "v"]
    assert [evaluation.results.episodes[0].success for evaluation in evaluations] == [True, False, True]
    assert "2 evaluations" in write_reports([folder / FILE_NAME, folder / "old.json"])[0].read_text(encoding="utf-8")
    for twice in ([folder, folder / FILE_NAME], [folder / "old.json", tmp_path / "v" / ".." / "w" / "old.json"]):
        with pytest.raises(ValueError, match="given twice"):
            load_evaluations(twice)


def test_unusable_input_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", [episode(1, 0, True)])
    with pytest.raises(ValueError, match="given twice"):
        write_reports([folder, folder / FILE_NAME])
    with pytest.raises(ValueError, match="no results were given"):
        write_reports([])
    for limit in (-1, float("inf"), float("nan"), 1e307):
        with pytest.raises(ValueError, match="max_embedded_mb is .*; give 0 .embed nothing. or more, a finite number"):
            write_reports([folder], max_embedded_mb=limit)
    with pytest.raises(FileNotFoundError, match="no results at"):
        write_reports([tmp_path / "nowhere"])
    assert report_line(tmp_path / "nowhere").startswith("no report: no results at")
    assert report_line(folder) == f"report: {folder / 'report.html'}"
