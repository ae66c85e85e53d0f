"""The report of a run, read back from its page."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import Rows, add_pictures_and_rollouts, read, text_of
from report_page import EVIL, write_video

from prismatic.report.data import ReportData, Table
from prismatic.report.figures import Curve
from prismatic.report.media import MediaFiles
from prismatic.training.config import FinetuneConfig
from prismatic.training.runs.folder import RunFolder
from prismatic.training.runs.identity import Change
from prismatic.training.runs.record import record_end, record_start
from prismatic.training.runs.saving import Facts
from prismatic.training.telling.compare import comparison
from prismatic.training.telling.folder import RunRecord
from prismatic.training.telling.page import report_data, write_page
from prismatic.training.telling.sections import media_note
from prismatic.vla.robots import ALOHA, LIBERO

MakeRun = Callable[..., Path]


def told(run: Path) -> ReportData:
    """What the page says, before it is drawn."""
    return report_data(RunRecord.read(run), MediaFiles(run, 0))


def standing(data: ReportData) -> str:
    """The sentence that says how the run stands."""
    assert isinstance(data.summary[0], str)
    return data.summary[0]


def in_table(data: ReportData, title: str) -> list[str]:
    """The rows of a table, each as one text."""
    (table,) = (block for section in data.sections for block in section.blocks if block.title == title)
    assert isinstance(table, Table)
    return [" | ".join(cell.text for cell in row) for row in table.cells]


def test_a_run_that_goes_on_says_so_and_renews_itself(run_folder: MakeRun) -> None:
    run = run_folder()
    with RunFolder(run).held():
        page = write_page(run)
    text = text_of(page)
    assert page == run / "report.html"
    assert re.search(
        r"Running since \d{4}-\d\d-\d\d \d\d:\d\d UTC\. Step 100 of 200 is done, 2\.0 per second of late; ", text
    )
    assert "about 50 s left" in text and "50 % step 100 of 200" in text and "50 s left, about" in text
    (line,) = (attrs for tag, attrs in read(page).tags if attrs.get("id") == "live")
    assert line["data-every"] == "120.0"
    assert '<meta http-equiv="refresh" content="120">' in page.read_text()


def test_it_holds_what_the_lines_hold(run_folder: MakeRun) -> None:
    run = run_folder()
    page = write_page(run)
    text, rows = text_of(page), Rows(page)
    for words in ("0.01 training loss", "0.5 lowest validation loss (step 60, now 0.66)", "30.0 visual tokens kept",
                  "16 samples per second (20 % waiting for data)", "1.25 GB most memory held (host)",
                  "L1 on held-out frames at step 100", "No loss spike"):  # fmt: skip
        assert words in text
    assert rows.row("x") == ["0.1100", "0.0550"] and rows.row("rot z") == ["0.1600", "0.0800"]
    assert rows.row("gripper") == ["0.1700", "0.0850"]
    assert rows.row("base model") == ["/models/base"] and rows.row("data: libero_tiny_no_noops") == ["sha256:data"]
    assert rows.row("--max_steps") == ["200"]
    described = [attrs["aria-label"] or "" for _, attrs in read(page).tags if attrs.get("role") == "img"]
    charts = {words.partition(", over")[0]: words for words in described}
    assert "training 1 to 0.01; held out 0.66 to 0.66" in charts["Loss"]
    assert "mean 39.9 to 30; fewest of a sample 20 to 20; most of a sample 60 to 60" in charts["Visual tokens kept"]
    assert "camera 1 15 to 15; camera 2 24.9 to 15" in charts["Visual tokens kept per camera"]
    assert "share 20 to 20" in charts["Waiting for data"] and "host 1.25 to 1.25" in charts["Most memory held"]
    assert "x 0.15 to 0.11" in charts["L1 of each dimension"]


@pytest.mark.parametrize(
    ("how", "words", "sentence"),
    [
        ("finished", "", r"Finished at [^.]* UTC, after step 100 of 200\.$"),
        ("preempted", "SIGTERM", r"Preempted \(SIGTERM\) at [^.]*, after step 100 of 200: saved, and the same command"),
        ("error", "the loss is nan", r"Stopped by an error at [^.]* UTC, after step 100 of 200\.$"),
    ],
)
def test_how_it_ended_is_said(run_folder: MakeRun, how: str, words: str, sentence: str) -> None:
    run = run_folder()
    record_end(run, 100, how, words)
    data = told(run)
    assert re.match(sentence, standing(data)) and data.live is None
    assert data.alerts == (["Stopped by an error: the loss is nan"] if how == "error" else [])
    assert f"| {how} at step 100, " in in_table(data, "Starts")[0]


def test_one_that_was_killed_is_not_said_to_run(run_folder: MakeRun) -> None:
    data = told(run_folder())
    assert "It is not running, and did not say how it ended; its last line of metrics is of step 100" in standing(data)
    assert data.live is None


def test_a_run_of_before_has_a_report_too(run_folder: MakeRun) -> None:
    """No robot and no ends in `run.json`, no memory, names or dimensions in the metrics; then no `run.json` at all."""
    run = run_folder(steps=200)
    content = json.loads((run / "run.json").read_text())
    del content["robot"]
    (run / "run.json").write_text(json.dumps(content))
    path = run / "metrics.jsonl"
    new = ("host_peak_gb", "val_l1_dimensions", "val_l1_current_dimensions", "loss_spike", "tokens_kept_min")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    old = [{name: value for name, value in line.items() if name not in new} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    text = text_of(write_page(run))
    assert "Finished at " in text and "after step 200 of 200" in text
    assert "Validation by action dimension" not in text and "Most memory held" not in text
    (run / "run.json").unlink()
    data = told(run)
    assert data.title == "Training run run" and "after" not in standing(data)
    assert [headline.value for headline in data.headlines][:2] == ["200", "0.005"]


def test_a_resumed_run_tells_its_starts_and_what_changed(run_folder: MakeRun) -> None:
    run = run_folder()
    record_end(run, 100, "preempted", "SIGUSR1")
    config = FinetuneConfig(run_root_dir=run.parent, run_id_override="run", max_steps=400)
    facts = Facts("/models/base", "sha256:base", {}, 200, 8)
    record_start(config, facts, LIBERO, 100, 2, "cuda", [Change("max_steps", 200, 400)])
    with RunFolder(run).held():
        data = told(run)
    assert "start 2, from step 100. Step 100 of 400 is done" in standing(data) and data.live is not None
    first, second = in_table(data, "Starts")
    assert "| 0 | 1 x cpu | preempted at step 100, " in first and "none" in first
    assert "| 100 | 2 x cuda | – | --max_steps 400 (was 200)" in second
    assert "--max_steps | 400" in in_table(data, "Flags that were given")


def test_pictures_and_rollouts_stand_beside_the_page_or_in_it(run_folder: MakeRun, tmp_path: Path) -> None:
    run = run_folder()
    add_pictures_and_rollouts(run)
    page = write_page(run)
    addresses, text = read(page).addresses, text_of(page)
    assert {"pictures/strip.webp", "pictures/kept/step_00000100.webp", "pictures/kept.mp4",
            "rollouts/50/a%20b.mp4"} <= set(addresses)  # fmt: skip
    assert not any(address.startswith("data:") for address in addresses) and page.stat().st_size < 1.5e6
    assert "files beside this page" in text and "40.5 tokens kept: the mean of 2 frames that stay the same" in text
    assert f"<code>lightvla report {run.resolve()} --output_dir one_page</code>" in page.read_text()
    (newest, first) = in_table(told(run), "Success by step")
    assert newest.startswith("100 | 1/1 · 100 %") and first.startswith("50 | 1/2 · 50 %") and first.endswith("| 80")
    assert "step 50, initial state 3: solved" in text
    elsewhere = write_page(run, tmp_path / "mailed", max_embedded_mb=5)
    shutil.rmtree(run / "pictures")
    sources = [attrs["src"] or "" for tag, attrs in read(elsewhere).tags if tag in ("img", "video")]
    assert len(sources) == 4 and all(source.startswith("data:") for source in sources)


def test_a_page_that_was_too_small_for_its_pictures_says_how_large_it_must_be(run_folder: MakeRun) -> None:
    run = run_folder()
    add_pictures_and_rollouts(run)
    files = MediaFiles(run, 1)
    report_data(RunRecord.read(run), files)
    (advice,) = media_note(RunRecord.read(run), files)
    assert files.embedded == 0 and files.linked == 4 and advice.command.endswith(" --max_embedded_mb 1")


def test_a_run_without_a_pruner_draws_nothing_of_one(run_folder: MakeRun) -> None:
    titles = [block.title for section in told(run_folder(pruner="none")).sections for block in section.blocks]
    assert "Learning rate (1 is 0.0005)" in titles and "Loss" in titles
    assert not any("okens" in title or "noise" in title for title in titles)


def test_a_name_of_a_picture_leads_nowhere_else(run_folder: MakeRun) -> None:
    run = run_folder()
    add_pictures_and_rollouts(run)
    (run / "pictures" / "pictures.json").write_text(json.dumps([{"step": 1, "file": "../../secret.webp"}, 3, {}]))
    (run.parent / "secret.webp").write_bytes(b"x")
    (section,) = (section for section in told(run).sections if section.title == "What the pruner keeps")
    assert [block.title for block in section.blocks] == ["One frame as training goes on", "As a film"]


ODD: tuple[Any, ...] = (None, "x", 3, -(10**400), True, [], [None], ["x"], [1.0], {}, float("nan"), float("inf"))


def test_values_of_another_kind_are_left_out(run_folder: MakeRun) -> None:
    """Each value of each name in turn; what is said of the others stays."""
    run = run_folder(steps=20)
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    for odd in ODD:
        changed = [{**line, **{name: odd for name in line if name != "step"}} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in (*changed, *lines[:1], *changed)))
        data = told(run)
        blocks = [block for section in data.sections for block in section.blocks]
        assert all(block.description for block in blocks if isinstance(block, Curve))
    for name in names:
        path.write_text("".join(json.dumps({**line, name: None}) + "\n" for line in lines))
        assert told(run).headlines[0].label == "step 20 of 200" and name not in RunRecord.read(run).history.last


@pytest.mark.parametrize("odd", [None, 3, "x", [], [None], {}, {"ended": 3, "changes": [3, {"flag": []}]}])
def test_a_run_json_with_odd_parts_is_read(run_folder: MakeRun, odd: object) -> None:
    run = run_folder(steps=20)
    file = run / "run.json"
    whole = json.loads(file.read_text())
    for changed in (
        *({**whole, name: odd} for name in whole),
        *({**whole, "starts": [{**whole["starts"][0], name: odd}]} for name in (*whole["starts"][0], "ended")),
        *({**whole, "facts": {**whole["facts"], name: odd}} for name in whole["facts"]),
        {**whole, "starts": [odd]},
        {**whole, "robot": {"action_names": odd}},
    ):
        file.write_text(json.dumps(changed))
        assert told(run).headlines and comparison([RunRecord.read(run)] * 2).title


def test_words_from_anywhere_are_words(run_folder: MakeRun) -> None:
    run = run_folder(run_id_note=EVIL, dataset_name=EVIL)
    path = run / "rollouts.jsonl"
    path.write_text(json.dumps({"step": 5, "instruction": EVIL, "success": True, "steps": 4, "video": "x.mp4"}) + "\n")
    write_video(run / "x.mp4")
    record_end(run, 100, "error", EVIL)
    page = read(write_page(run))
    assert " ".join(page.text).count(EVIL) >= 4  # the alert, two flags, the title of a clip
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_fourteen_dimensions_have_their_names_and_colours(run_folder: MakeRun) -> None:
    (section,) = (part for part in told(run_folder(robot=ALOHA)).sections if "dimension" in part.title)
    table, *charts = section.blocks
    assert isinstance(table, Table) and [row[0].text for row in table.cells] == list(ALOHA.action_names)
    assert [row[1].text for row in table.cells][::13] == ["0.1100", "0.2400"]
    assert [chart.title for chart in charts] == ["L1, left waist and on", "L1, right shoulder and on"]
