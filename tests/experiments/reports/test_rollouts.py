"""The report's clips and tables of single rollouts."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

from report_page import Page
from report_results import CONFIG, POLICY, RUN, data_of, digest, episode, save, tables, texts

from experiments.robot.libero.reports.evaluation import last_line
from experiments.robot.libero.reports.page import write_reports
from experiments.robot.libero.reports.rollouts import MOST_CLIPS, MOST_ROWS
from experiments.robot.libero.results.results import FILE_NAME, Results
from prismatic.report.data import Clip, Table


def test_failures_come_first_and_what_does_not_fit_is_linked(tmp_path: Path, video: Path) -> None:
    folder = save(tmp_path / "run", [episode(1, 0, True), episode(1, 1, False)], video)
    room = 4 * -(-video.stat().st_size // 3) + 2000  # one video and its picture
    data = data_of(folder, room=room)
    clips = [block for section in data.sections for block in section.blocks if block.kind == "clip"]
    failure, success = clips
    assert (
        failure.title.endswith("initial state 1, trial 1: not solved")
        and failure.video.content == video.read_bytes()
        and failure.picture is not None
    )
    assert success.video.content is None and success.video.source == "videos/task1%20trial0.mp4"
    assert len(data.alerts) == 1 and "1 is a link" in data.alerts[0] and "--max_embedded_mb" in data.alerts[0]
    html, markdown = write_reports([folder], tmp_path / "elsewhere", max_embedded_mb=0)
    addresses = [a for a in Page(html.read_text()).addresses if not a.startswith("#")]
    addresses += re.findall(r"\]\(([^)]+)\)", markdown.read_text())
    assert len(set(addresses)) == 4
    assert all((html.parent / unquote(address)).is_file() for address in addresses)


def test_a_lost_video_is_said_not_raised(tmp_path: Path, video: Path) -> None:
    folder = save(tmp_path / "run", [episode(1, 0, False), episode(1, 1, False)], video)
    (folder / "videos" / "task1 trial0.mp4").unlink()
    (section,) = (section for section in data_of(folder).sections if section.title == "Failures")
    clip, table = section.blocks
    assert clip.kind == "clip" and "1 of 2 with a clip" in section.note and "of 1 are not where" in section.note
    assert isinstance(table, Table) and texts(table) == [
        ["put it in place 1", "0", "0", "not solved", "20", "file is missing"]
    ]


def test_clips_of_one_task_are_told_apart_by_their_headlines(tmp_path: Path, video: Path) -> None:
    records = [episode(1, trial, trial == 2, initial_state=30 + trial) for trial in range(3)]
    run = save(tmp_path / "run", records, video)
    blank = save(tmp_path / "blank", [episode(1, 0, False)], video, config={"control": "blank_images"})

    def titles(*folders: Path) -> list[str]:
        return [block.title for s in data_of(*folders).sections for block in s.blocks if block.kind == "clip"]

    own = [f"put it in place 1, initial state 3{n}, trial {n}: {'' if n == 2 else 'not '}solved" for n in (0, 1, 2)]
    assert titles(run) == own
    last = "blank: put it in place 1, initial state 0, trial 0: not solved"
    assert titles(run, blank) == [*(f"run: {title}" for title in own[:2]), last, f"run: {own[2]}"]
    sections = {section.title: section for section in data_of(run, blank).filled}
    for title in ("Failures", "Visual tokens kept", "Time per policy query", "All rollouts"):
        assert sections[title].note.count("Controls: blank (blank images).") == 1
    assert "(control" not in " ".join(
        text for row in texts(tables(data_of(run, blank))["Over all policy queries"]) for text in row
    )
    assert not any("Controls:" in section.note for section in data_of(blank).sections)


def test_long_tables_of_rollouts_are_folded(tmp_path: Path) -> None:
    for count, folded in ((30, False), (31, True)):
        data = data_of(save(tmp_path / str(count), [episode(1, trial, True) for trial in range(count)]))
        (section,) = (section for section in data.sections if section.title == "All rollouts")
        assert [block.folded for block in section.blocks if isinstance(block, Table)] == [folded]


def test_the_error_is_the_last_line() -> None:
    assert last_line("Traceback\n  File\nValueError: bad\n\n") == "ValueError: bad"
    assert last_line("  \n") == "no traceback was recorded"


def test_clips_are_spread_over_evaluations_and_tasks_failures_first(tmp_path: Path, video: Path) -> None:
    """Three evaluations of two tasks with twelve filmed failures and four filmed successes each."""
    folders = []
    for name in "abc":
        records = [episode(1 + trial % 2, trial, trial >= 12, suite=f"suite_{name}") for trial in range(16)]
        folders.append(save(tmp_path / name, records, video))
    sections = {section.title: section for section in data_of(*folders).sections}
    failures = [block for block in sections["Failures"].blocks if isinstance(block, Clip)]
    assert len(failures) == 18 and len(sections["Successes"].blocks) == 6
    shown = Counter((clip.title[0], re.search(r"place (\d)", clip.title)[1]) for clip in failures)  # type: ignore[index]
    assert shown == {(name, task): 3 for name in "abc" for task in "12"}
    (table,) = (block for block in sections["Failures"].blocks if isinstance(block, Table))
    assert len(table.rows) == 36 - 18 and all(row[-1].address.endswith(".mp4") for row in table.cells)
    assert "18 of 36 with a clip" in sections["Failures"].note
    # Failures go into the page first, from every evaluation before a second one from any.
    room = 3 * (4 * -(-video.stat().st_size // 3) + 200)
    data = data_of(*folders, room=room)
    clips = [block for section in data.sections for block in section.blocks if isinstance(block, Clip)]
    assert [clip.title[0] for clip in clips if clip.video.content is not None] == ["a", "b", "c"]


def test_a_report_of_thousands_of_rollouts_stays_small(tmp_path: Path, video: Path) -> None:
    """Twelve evaluations, all of their failures filmed; what the page leaves out it says."""
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    folders = []
    for suite in suites:
        for seed in (7, 8, 9):
            records = [
                episode(
                    task, state, state % 5 > 0, suite=suite, seed=seed, actions_sha256=digest(f"{seed} {task} {state}")
                )
                for task in range(10)
                for state in range(10)
            ]
            folder = save(tmp_path / f"{suite}-{seed}", records, config={"task_suite_name": suite, "seed": seed})
            for record in records[::5]:
                record.video = f"videos/{record.file_stem}.mp4"
            (folder / "videos").mkdir()
            for record in records[::5]:
                (folder / str(record.video)).hardlink_to(video)
            Results(RUN, CONFIG | {"task_suite_name": suite, "seed": seed}, POLICY, {}, records).save(
                folder / FILE_NAME
            )
            folders.append(folder)
    html, _ = write_reports(folders)
    assert html.stat().st_size < 10e6
    page = Page(html.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("video") == MOST_CLIPS
    assert any(f"The first {MOST_ROWS} of 1200, failures before successes" in text for text in page.text)
