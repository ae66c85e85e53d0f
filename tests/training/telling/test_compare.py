"""Several runs in one page."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_runs import Rows, read, text_of

from prismatic.training.telling.compare import labels, write_comparison

MakeRun = Callable[..., Path]


def test_runs_stand_over_each_other(run_folder: MakeRun, tmp_path: Path) -> None:
    one = run_folder(name="one", learning_rate=5e-4)
    other = run_folder(name="other", learning_rate=1e-3, steps=200)
    page = write_comparison([one, other], tmp_path / "compared")
    text, rows = text_of(page), Rows(page)
    assert page == tmp_path / "compared" / "report.html" and "2 training runs compared" in text
    assert rows.row("one")[:3] == ["100 of 200", "0.0100", "0.6600"]
    assert rows.row("other")[:4] == ["200 of 200", "0.0050", "2.4600", "0.5000 step 60"]
    assert rows.row("--learning_rate") == ["0.0005", "0.001"]
    assert not any(row and row[0] in ("--max_steps", "its weights") for row in rows.rows)  # the same in both
    assert rows.row("x") == ["0.1100", "0.1050"]
    described = " ".join(attrs["aria-label"] or "" for _, attrs in read(page).tags if attrs.get("role") == "img")
    assert "Training loss, over optimiser steps: one 1 to 0.01; other 1 to 0.005" in described
    assert re.search("one: It is not running.* other: Finished", text)


def test_a_run_of_before_compares_with_one_of_now(run_folder: MakeRun, tmp_path: Path) -> None:
    old, new = run_folder(name="old"), run_folder(name="new")
    (old / "run.json").unlink()
    (old / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')
    rows = Rows(write_comparison([old, new], tmp_path))
    assert rows.row("old")[:3] == ["3", "0.5000", "–"] and rows.row("--batch_size") == ["–", "8"]


def test_hashes_are_shown_by_their_first_digits(run_folder: MakeRun, tmp_path: Path) -> None:
    runs = [run_folder(name=name) for name in ("one", "other")]
    for run, digit in zip(runs, "ab", strict=True):
        text = (run / "run.json").read_text()
        (run / "run.json").write_text(text.replace("sha256:base", "sha256:" + "0" * 11 + digit * 53))
    rows = Rows(write_comparison(runs, tmp_path))
    assert rows.row("its weights") == ["sha256:" + "0" * 11 + digit for digit in "ab"]


def test_long_names_become_letters() -> None:
    assert labels(["a", "b"]) == ["a", "b"]
    assert labels(["a" * 40, "b"]) == labels(["same", "same"]) == ["run A", "run B"]


def test_what_cannot_be_compared_is_said(run_folder: MakeRun, tmp_path: Path) -> None:
    run = run_folder()
    with pytest.raises(ValueError, match="a run is given twice"):
        write_comparison([run, run.parent / "run"], tmp_path)
    with pytest.raises(ValueError, match="9 runs; one page tells at most 8 apart"):
        write_comparison([tmp_path / str(number) for number in range(9)], tmp_path)
