"""The report of evaluations, from results files with real videos and pictures beside them."""

import base64
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from report_page import EVIL, Page, write_video
from scipy import stats

from experiments.robot.libero.evaluation.command import report_line
from experiments.robot.libero.reports.cost import REST, SERVER_REST, latency_section, query_times
from experiments.robot.libero.reports.evaluation import Evaluation, last_line, load_evaluations, short_names
from experiments.robot.libero.reports.page import report_data, write_reports
from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.results.results import FILE_NAME, EpisodeRecord, Results
from lightvla.commands.compare import main as compare_command
from prismatic.pictures.images import encode_png
from prismatic.report.charts import StackedBars
from prismatic.report.data import CodeBlock, ReportData, Table
from prismatic.report.media import MediaFiles

POLICY = {
    "checkpoint": "runs/small",
    "parameters": 1_700_000,
    "pruner": "lightvla",
    "robot": {"control_rate_hz": 20.0, "open_loop_steps": 8},
    "assumptions": ["two images are read"],
}
CONFIG = {"task_suite_name": "libero_goal", "num_steps_wait": 10, "env_img_res": 128, "wide_starts_m": 0.06}
RUN = {"command": ["eval.py", "--seed", "7", "--note", "a b"], "complete": True, "seed": 7, "seconds": 61.0}


def episode(task: int, trial: int, success: bool | None, **more: object) -> EpisodeRecord:
    """A rollout of three queries whose stages take 1, 2, 3 and 4 ms of 15."""
    base = {"suite": "libero_goal", "task_index": task, "task_name": f"put_it_in_place_{task}", "instruction": "do it"}
    invalid = None if success is not None else "Traceback (most recent call last):\n  x\nValueError: the bowl fell"
    given = {"initial_state": trial, "trial": trial, "seed": 7, "success": success, "invalid": invalid, "steps": 20}
    stages = {"preprocessing": 1.0, "vision": 2.0, "pruner": 3.0, "llm": 4.0, "total": 11.0}
    queries = {"tokens_kept": [12, 10, 8], "num_visual_tokens": 98, "latency_ms": [15.0] * 3}
    times = {"stage_ms": {name: [time] * 3 for name, time in stages.items()}}
    return EpisodeRecord(**{**base, **given, **queries, **times, **more})  # type: ignore[arg-type]


def save(folder: Path, episodes: list[EpisodeRecord], videos: Path | None = None, **parts: dict) -> Path:
    """A results file with a video and a picture for each rollout that has an outcome, where `videos` gives one."""
    for record in episodes:
        if videos is not None and record.invalid is None:
            record.video = f"videos/task{record.task_index} trial{record.trial}.mp4"
            path = folder / record.video
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(videos.read_bytes())
            path.with_suffix(".png").write_bytes(encode_png(np.full((8, 8, 3), 128, np.uint8)))
    results = Results(
        {**RUN, **parts.get("run", {})},
        {**CONFIG, **parts.get("config", {})},
        {**POLICY, **parts.get("policy", {})},
        collect_versions(),
        episodes,
    )
    results.save(folder / FILE_NAME)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


def data_of(*folders: Path, room: int = 10**8) -> ReportData:
    return report_data(load_evaluations(folders), MediaFiles(folders[0], room))


def tables(data: ReportData) -> dict[str, Table]:
    return {block.title: block for section in data.sections for block in section.blocks if isinstance(block, Table)}


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in (*table.cells, *table.total_cells)]


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


def test_the_table_of_tasks_counts_each_task_by_itself(tmp_path: Path) -> None:
    slow = {"latency_ms": [900.0, 30.0, 50.0]}
    episodes = [episode(1, 0, True, steps=40, **slow), episode(4, 0, True), episode(4, 1, None), episode(4, 2, False)]
    table = tables(data_of(save(tmp_path / "run", episodes)))["Tasks"]
    assert [row[2:] for row in texts(table)] == [
        ["0", "40", "10.0", "50.0"], ["1", "20", "10.0", "15.0"], ["1", "30", "10.0", "15.0"]
    ]  # fmt: skip


def test_times_are_split_by_stage(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latency, vision, llm = rng.uniform(20, 30, 40), rng.uniform(1, 5, 40), rng.uniform(3, 9, 40)
    stages = {"vision": vision.tolist(), "llm": llm.tolist(), "total": (vision + llm).tolist()}
    recorded = episode(1, 0, True, latency_ms=latency.tolist(), stage_ms=stages)
    silent = episode(1, 1, True, latency_ms=[40.0, 41.0], stage_ms={})
    evaluation = Evaluation("run", Results(RUN, CONFIG, POLICY, {}, [recorded, silent]), tmp_path)
    times = query_times(evaluation)
    assert times.whole.tolist() == [*latency.tolist(), 40.0, 41.0]
    assert list(times.stages) == ["vision", "llm", REST]
    assert times.stages[REST] == pytest.approx(latency - vision - llm)
    section = latency_section([evaluation])
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    for row, values in zip(texts(table), (*times.stages.values(), times.whole), strict=True):
        expected = [stats.scoreatpercentile(values, p) for p in (50, 90, 95, 99)] + [sum(values) / len(values)]
        assert [float(number) for number in row[1:]] == pytest.approx(expected, abs=0.0501)
    assert "stages of 2 queries were not recorded" in table.note
    means = next(block for block in section.blocks if block.kind == "chart").description
    assert f"vision {vision.mean():.1f}" in means


def test_a_server_s_time_is_not_counted_twice(tmp_path: Path) -> None:
    """A query of 100 ms, 90 of them in the server: 30 for vision, 50 for the language model, 10 for something else."""
    stages = {"total": [95.0] * 2, "server": [90.0] * 2, "vision": [30.0] * 2, "llm": [50.0] * 2}
    split = episode(1, 0, True, latency_ms=[100.0] * 2, stage_ms=stages)
    whole = episode(1, 1, True, latency_ms=[100.0], stage_ms={"total": [95.0], "server": [90.0]})
    odd = episode(1, 2, True, latency_ms=[100.0], stage_ms={"server": [20.0], "queue": [60.0]})
    for record, expected in (
        (split, {"vision": 30.0, "llm": 50.0, SERVER_REST: 10.0, REST: 10.0}),
        (whole, {"server": 90.0, REST: 10.0}),
        (odd, {"queue": 60.0, SERVER_REST: 0.0, REST: 40.0}),  # the parts lie outside of the server's own time
    ):
        evaluation = Evaluation("run", Results(RUN, CONFIG, POLICY, {}, [record]), tmp_path)
        times = query_times(evaluation)
        assert {name: values.mean() for name, values in times.stages.items()} == pytest.approx(expected)
        assert sum(values.sum() for values in times.stages.values()) == pytest.approx(times.whole.sum())
        chart = next(block for block in latency_section([evaluation]).blocks if block.kind == "chart")
        assert isinstance(chart, StackedBars) and sum(parts[0] for parts in chart.parts.values()) == pytest.approx(100)


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


def test_evaluations_on_the_same_starts_are_compared_and_the_command_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = save(tmp_path / "the better", [episode(1, trial, True) for trial in range(9)])
    worse = save(tmp_path / "worse", [episode(1, trial, trial == 0) for trial in range(9)])
    elsewhere = save(tmp_path / "elsewhere", [episode(4, 0, True)])
    blocks = [b for s in data_of(better, worse, elsewhere).sections for b in s.blocks if isinstance(b, CodeBlock)]
    difference, other = blocks[:2]
    assert difference.title == "The difference between the better and worse"
    p_value = stats.binomtest(0, 8).pvalue  # McNemar: eight starts differ, all in one direction
    assert difference.note.startswith("the better is better than worse: +88.9 points")
    assert f"p = {p_value:.3f}" in difference.note
    words = shlex.split(difference.code)
    assert words[:2] == ["lightvla", "compare"]
    assert compare_command(words[2:]) == 0 and "88.9" in capsys.readouterr().out
    assert other.note.startswith("Not compared: ") and "elsewhere" in other.code
    assert not any("lightvla compare" in b.code for s in data_of(worse).sections for b in s.blocks if b.kind == "code")


def test_a_difference_in_mujoco_stands_beside_the_difference(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, [episode(1, trial, True) for trial in range(9)]) for name in ("older", "newer")]
    for folder, version in zip(folders, ("3.2.3", "3.2.7"), strict=True):
        found = Results.load(folder)
        found.versions["mujoco"] = version
        found.save(folder / "results.json")
    blocks = [b for s in data_of(*folders).sections for b in s.blocks if isinstance(b, CodeBlock)]
    assert "Mind: not the same protocol: mujoco 3.2.3 for older; 3.2.7 for newer." in blocks[0].note


def test_long_tables_of_rollouts_are_folded(tmp_path: Path) -> None:
    for count, folded in ((30, False), (31, True)):
        data = data_of(save(tmp_path / str(count), [episode(1, trial, True) for trial in range(count)]))
        (section,) = (section for section in data.sections if section.title == "All rollouts")
        assert [block.folded for block in section.blocks if isinstance(block, Table)] == [folded]


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


def test_the_error_is_the_last_line() -> None:
    assert last_line("Traceback\n  File\nValueError: bad\n\n") == "ValueError: bad"
    assert last_line("  \n") == "no traceback was recorded"


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
