"""The page of a run while it is trained, and behind its end."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_up_runs import Rows, text_of, write_run

from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.logging import RunLog
from prismatic.training.loop import finetune
from prismatic.training.preemption import Preempted
from prismatic.training.runs.files import is_held
from prismatic.training.runs.folder import RunFolder
from prismatic.training.step import StepMetrics
from prismatic.training.telling import live
from prismatic.training.telling.live import LiveReport

ALONE = Ranks(0, 1, torch.device("cpu"))


def take_steps(run_log: RunLog, *steps: int) -> None:
    for step in steps:
        loss = torch.tensor(1.0 / step)
        run_log.add(StepMetrics(loss, loss, loss, torch.tensor([[3, 4]]), torch.ones(2, 7)), waited=0.0)
        run_log.step(step, {"learning_rate": 1e-3, "noise_scale": 0.5})


def wait_for(page: Path, words: str) -> str:
    deadline = time.monotonic() + 120
    while not (page.is_file() and words in text_of(page)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return text_of(page)


def test_the_page_of_a_run_that_is_trained(flags: Callable[..., FinetuneConfig]) -> None:
    config = flags(max_steps=3, use_val_set=True, val_freq=2, keep_best=True, report_minutes=60.0, run_id_note="<b>")
    folder = finetune(config)
    assert folder is not None
    text, rows = text_of(config.run_dir / "report.html"), Rows(config.run_dir / "report.html")
    assert "Finished at " in text and "after step 3 of 3." in text
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "loss" in line)
    validation = next(line for line in reversed(lines) if "val_loss" in line)
    assert f"{last['loss']:.4g} training loss" in text and f"{last['tokens_kept']:.1f} visual tokens kept" in text
    assert last["host_peak_gb"] > 0.1
    names = ("x", "y", "z", "rot x", "rot y", "rot z", "gripper")
    errors = dict(zip(names, validation["val_l1_dimensions"], strict=True))
    for name, error in errors.items():
        assert rows.row(name)[0] == f"{error:.4f}"
    assert sum(errors.values()) / 7 == pytest.approx(validation["val_loss"], rel=1e-5)
    (row,) = (row for row in rows.rows if row and row[-1] == folder.name)
    assert row[0] == "3" and row[1].startswith(f"{validation['val_loss']:.4f}") and row[3] == "latest, best"
    assert rows.row("--run_id_note") == ["<b>"]


def test_a_run_is_live_until_it_says_how_it_ended(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=0, report_minutes=60.0, log_freq=1)
    page = config.run_dir / "report.html"
    with (
        RunFolder(config.run_dir).held(),
        pytest.raises(Preempted),
        RunLog(config, ALONE, 0) as run_log,
    ):
        take_steps(run_log, 1)
        assert "Running since" in wait_for(page, "Running since")
        take_steps(run_log, 2, 3)  # no page is due
        raise Preempted("SIGTERM", 3)
    assert "Preempted (SIGTERM) at" in text_of(page) and "after step 3 of 200" in text_of(page)
    assert not list(config.run_dir.glob("*.partial"))


@pytest.mark.parametrize(
    ("error", "how", "words"),
    [
        (FloatingPointError("the loss is nan"), "error", "the loss is nan"),
        (RuntimeError("CUDA out of memory"), "error", "RuntimeError: CUDA out of memory"),
        (KeyboardInterrupt(), "preempted", "SIGINT"),
    ],
)
def test_an_end_is_written_down(tmp_path: Path, error: BaseException, how: str, words: str) -> None:
    config = write_run(tmp_path, steps=0, report_minutes=0.0, log_freq=1)
    with pytest.raises(type(error)), RunLog(config, ALONE, 0) as run_log:
        take_steps(run_log, 1, 2)
        raise error
    (start,) = json.loads((config.run_dir / "run.json").read_text())["starts"]
    assert start["ended"].pop("time").endswith("Z")
    assert start["ended"] == {"step": 2, "how": how, "words": words}
    assert not (config.run_dir / "report.html").exists()


def test_what_goes_wrong_with_the_page_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path, steps=2).run_dir
    (run / "metrics.jsonl").write_text("no metrics\n")
    report = LiveReport(run, 60.0)
    report.write()
    report.close()
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        f"report.html could not be written: ValueError: {run / 'metrics.jsonl'}, line 1: no JSON object with a `step`"
    ] * 2


def test_a_last_page_that_takes_too_long_is_said_to_be_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, steps=2).run_dir
    monkeypatch.setattr(live, "_PATIENCE_S", 0.0)
    report = LiveReport(run, 60.0)
    report.close()
    assert caplog.messages == [
        "the last report.html was not finished in time and may still say that the run goes on; make it again with: "
        f"lightvla report {run}"
    ]
    assert report._writer is not None and report._writer.wait(120) is not None


def test_a_run_is_held_by_whoever_trains_it(tmp_path: Path) -> None:
    assert is_held(tmp_path) is False
    with RunFolder(tmp_path).held():
        assert is_held(tmp_path) is True
    assert is_held(tmp_path) is False
