"""The report of evaluations, from results files with real videos and pictures beside them."""

import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from report_page import EVIL, Page, write_video
from scipy import stats

from experiments.robot.libero.report import report_data, write_reports
from experiments.robot.libero.report_cost import REST, latency_section, look_times
from experiments.robot.libero.report_evaluation import Evaluation, last_line, load_evaluations, short_names
from experiments.robot.libero.results import FILE_NAME, EpisodeRecord, Results, collect_versions
from experiments.robot.libero.run_libero_eval import report_line
from prismatic.report.data import ReportData, Table
from prismatic.report.media import MediaFiles
from prismatic.visualization import encode_png

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
    """A rollout of three looks whose stages take 1, 2, 3 and 4 ms of 15."""
    base = {"suite": "libero_goal", "task_index": task, "task_name": f"put_it_in_place_{task}", "instruction": "do it"}
    invalid = None if success is not None else "Traceback (most recent call last):\n  x\nValueError: the bowl fell"
    given = {"initial_state": trial, "trial": trial, "seed": 7, "success": success, "invalid": invalid, "steps": 20}
    stages = {"preprocessing": 1.0, "vision": 2.0, "pruner": 3.0, "llm": 4.0, "total": 11.0}
    looks = {"tokens_kept": [12, 10, 8], "num_visual_tokens": 98, "latency_ms": [15.0] * 3}
    times = {"stage_ms": {name: [time] * 3 for name, time in stages.items()}}
    return EpisodeRecord(**{**base, **given, **looks, **times, **more})  # type: ignore[arg-type]


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
                  "1 of 4 rollouts of run ended", "begun 3 times", "mujoco"):  # fmt: skip
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
        "not solved" in failure.caption and failure.video.content == video.read_bytes() and failure.picture is not None
    )
    assert success.video.content is None and success.video.source == "videos/task1%20trial0.mp4"
    assert len(data.alerts) == 1 and "1 are links" in data.alerts[0] and "--max_embedded_mb" in data.alerts[0]
    html, markdown = write_reports([folder], tmp_path / "elsewhere", max_embedded_mb=0)
    addresses = [a for a in Page(html.read_text()).addresses if not a.startswith("#")]
    addresses += re.findall(r"\]\(([^)]+)\)", markdown.read_text())
    assert len(set(addresses)) == 4
    assert all((html.parent / unquote(address)).is_file() for address in addresses)


def test_a_lost_video_is_said_not_raised(tmp_path: Path, video: Path) -> None:
    folder = save(tmp_path / "run", [episode(1, 0, False), episode(1, 1, False)], video)
    (folder / "videos" / "task1 trial0.mp4").unlink()
    (section,) = (section for section in data_of(folder).sections if section.title == "Failures")
    assert len(section.blocks) == 1 and "1 of 2 with a clip" in section.note and "1 are not where" in section.note


def test_an_incomplete_run_and_a_control_say_so_first(tmp_path: Path) -> None:
    run = save(tmp_path / "a", [episode(1, 0, True)], run={"complete": False})
    blank = save(tmp_path / "b", [episode(1, 0, False)], config={"control": "blank_images"})
    data = data_of(run, blank)
    assert data.alerts[0].startswith("Incomplete: a ") and "1 rollouts" in data.alerts[0]
    assert data.alerts[1].startswith("Control: in b (control: blank images), the policy saw mid-grey")
    empty = data_of(save(tmp_path / "c", [], run={"complete": False}))
    assert empty.alerts and "no valid rollout" in empty.headlines[0].label


def test_several_evaluations_have_a_column_each(tmp_path: Path) -> None:
    first = save(tmp_path / "first", [episode(1, 0, True), episode(1, 1, False), episode(4, 0, True)])
    swapped = [episode(1, t, False, other_task=4, other_success=t > 0, instruction="do that") for t in range(3)]
    second = save(tmp_path / "second", swapped, config={"control": "swapped_instruction"})
    table = tables(data_of(first, second))["Tasks"]
    label = "second (control: swapped instruction)"
    assert list(table.columns) == ["task", "first", f"{label}: own goal", f"{label}: the goal it was told"]
    counts = [[text.split(" ")[0] for text in row[1:]] for row in texts(table)]
    assert counts == [["1/2", "0/3", "2/3"], ["1/1", "–", "–"], ["2/3", "0/3", "2/3"]]
    html, _ = write_reports([first, second])
    assert html.parent == tmp_path  # the folder that holds both
    assert "told “do that”" not in html.read_text()  # said where there is a clip


def test_the_table_of_tasks_counts_each_task_by_itself(tmp_path: Path) -> None:
    slow = {"latency_ms": [900.0, 30.0, 50.0]}  # the first look of the run is left out
    episodes = [episode(1, 0, True, steps=40, **slow), episode(4, 0, True), episode(4, 1, None), episode(4, 2, False)]
    table = tables(data_of(save(tmp_path / "run", episodes)))["Tasks"]
    assert [row[2:] for row in texts(table)] == [
        ["0", "40", "10.0", "40.0"], ["1", "20", "10.0", "15.0"], ["1", "30", "10.0", "15.0"]
    ]  # fmt: skip


def test_times_are_split_by_stage_without_the_first_call(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latency, vision, llm = rng.uniform(20, 30, 40), rng.uniform(1, 5, 40), rng.uniform(3, 9, 40)
    latency[0] = 5000.0
    stages = {"vision": vision.tolist(), "llm": llm.tolist(), "total": (vision + llm).tolist()}
    recorded = episode(1, 0, True, latency_ms=latency.tolist(), stage_ms=stages)
    silent = episode(1, 1, True, latency_ms=[40.0, 41.0], stage_ms={})
    evaluation = Evaluation("run", Results(RUN, CONFIG, POLICY, {}, [recorded, silent]), tmp_path)
    times = look_times(evaluation)
    assert times.whole.tolist() == [*latency[1:].tolist(), 40.0, 41.0]
    assert list(times.stages) == ["vision", "llm", REST]
    assert times.stages[REST] == pytest.approx((latency - vision - llm)[1:])
    section = latency_section([evaluation])
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    for row, values in zip(texts(table), (*times.stages.values(), times.whole), strict=True):
        expected = [stats.scoreatpercentile(values, p) for p in (50, 90, 95, 99)] + [sum(values) / len(values)]
        assert [float(number) for number in row[1:]] == pytest.approx(expected, abs=0.0501)
    assert "stages of 2 looks were not recorded" in table.note and "left out" in section.note
    means = next(block for block in section.blocks if block.kind == "chart").description
    assert f"vision {vision[1:].mean():.1f}" in means


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


def test_long_tables_of_rollouts_are_folded(tmp_path: Path) -> None:
    for count, folded in ((30, False), (31, True)):
        data = data_of(save(tmp_path / str(count), [episode(1, trial, True) for trial in range(count)]))
        (section,) = (section for section in data.sections if section.title == "All rollouts")
        assert [block.folded for block in section.blocks if isinstance(block, Table)] == [folded]


def test_names_are_as_long_as_it_takes() -> None:
    folders = [Path("/x/seed7/wide"), Path("/x/seed8/wide"), Path("/x/seed8/blank")]
    assert short_names(folders[1:]) == ["wide", "blank"]
    assert short_names(folders) == ["seed7/wide", "seed8/wide", "seed8/blank"]


def test_the_error_is_the_last_line() -> None:
    assert last_line("Traceback\n  File\nValueError: bad\n\n") == "ValueError: bad"
    assert last_line("  \n") == "no traceback was recorded"


def test_unusable_input_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", [episode(1, 0, True)])
    with pytest.raises(ValueError, match="given twice"):
        write_reports([folder, folder / FILE_NAME])
    with pytest.raises(ValueError, match="no results were given"):
        write_reports([])
    with pytest.raises(ValueError, match="max_embedded_mb is -1"):
        write_reports([folder], max_embedded_mb=-1)
    with pytest.raises(FileNotFoundError, match="no results at"):
        write_reports([tmp_path / "nowhere"])
    assert report_line(tmp_path / "nowhere").startswith("no report: no results at")
    assert report_line(folder) == f"report: {folder / 'report.html'}"
