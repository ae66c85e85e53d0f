"""Metrics in bounded memory, against all lines at once."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic.training.telling.history import MEMORY_FILE, MOST, History, Thinned


def lines(count: int, first: int = 1) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    values = rng.uniform(0, 1, (first + count, 4)).tolist()[first:]
    return [
        {"step": first + n, "loss": loss, "tokens_kept": 50 * kept, "tokens_kept_min": 40 * low,
         "tokens_kept_max": 60 * high, "tokens_kept_per_image": [20 * kept, 30 * kept], "bad_samples": n // 90}
        for n, (loss, kept, low, high) in enumerate(values)
    ]  # fmt: skip


def write(run: Path, records: Iterable[dict[str, Any]], mode: str = "w") -> None:
    with (run / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_groups_hold_means_extremes_and_the_last_count() -> None:
    given, thinned = lines(5 * MOST + 3), Thinned()
    for record in given:
        thinned.add(record)
    assert MOST / 2 <= len(thinned.records) <= MOST and thinned.size == 8
    for place, group in enumerate(thinned.records):
        own = given[8 * place : 8 * place + 8]
        assert group["step"] == own[-1]["step"] and group["bad_samples"] == own[-1]["bad_samples"]
        for name, reduce in (("loss", np.mean), ("tokens_kept_min", np.min), ("tokens_kept_max", np.max)):
            assert group[name] == pytest.approx(reduce([record[name] for record in own]))
        assert group["tokens_kept_per_image"] == pytest.approx(
            np.mean([record["tokens_kept_per_image"] for record in own], axis=0)
        )
    assert 8 * (len(thinned.records) - 1) + thinned.filled == len(given)


def test_a_short_run_is_told_line_by_line(tmp_path: Path) -> None:
    given = lines(20)
    validation = {"step": 10, "val_loss": 0.5, "val_l1_dimensions": [0.1, 0.2]}
    better, later = {**validation, "step": 15, "val_loss": 0.25}, {**validation, "step": 20, "val_loss": 0.75}
    write(tmp_path, [*given, validation, better, later])
    history = History.read(tmp_path)
    assert history.lines.records == given and history.validations.records == [validation, better, later]
    assert history.best == (0.25, 15) and history.last["val_loss"] == 0.75 and history.last["loss"] == given[-1]["loss"]
    assert history.count == 23


@pytest.mark.parametrize("cuts", [(1, 2), (700, 701, 1500), (10, 1999)])
def test_what_is_read_bit_by_bit_is_what_is_read_at_once(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    given = lines(2000)
    write(tmp_path, [])
    for begin, end in zip((0, *cuts), (*cuts, 2000), strict=True):
        write(tmp_path, given[begin:end], "a")
        history = History.remembered(tmp_path)
    assert history == History.read(tmp_path) and history.count == 2000


def test_only_new_lines_are_read_and_a_half_one_waits(tmp_path: Path) -> None:
    write(tmp_path, lines(30))
    History.remembered(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    with path.open("r+b") as file:  # were the beginning read again, this would be refused
        file.write(b"x" * 20)
    write(tmp_path, lines(5, 31), "a")
    with path.open("a") as file:
        file.write('{"step": 36, "lo')
    assert History.remembered(tmp_path).count == 35
    with path.open("a") as file:
        file.write('ss": 1.5}\n')
    assert History.remembered(tmp_path).last["loss"] == 1.5
    assert path.read_bytes()[len(whole) - 10 : len(whole)] == whole[-10:]


def test_a_file_that_was_cut_back_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path, lines(30))
    assert History.remembered(tmp_path).count == 30
    write(tmp_path, [*lines(10), *({"step": step, "loss": 9.0} for step in range(11, 40))])  # a run that went back
    again = History.remembered(tmp_path)
    assert again == History.read(tmp_path) and again.count == 39 and again.last["loss"] == 9.0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}', '{"schema": 0, "history": {}}'])
def test_a_memory_of_another_version_is_let_go(tmp_path: Path, content: str) -> None:
    write(tmp_path, lines(4))
    (tmp_path / MEMORY_FILE).write_text(content)
    assert History.remembered(tmp_path).count == 4


def test_events_are_what_counts_up_and_what_is_marked(tmp_path: Path) -> None:
    records = [
        {"step": step, "loss": 1.0, "bad_samples": 0, "skipped_steps": 0, "loss_spike": 0.0} for step in range(9)
    ]
    records[2]["bad_samples"] = records[3]["bad_samples"] = 2
    records[4] |= {"loss_spike": 1.0, "skipped_steps": 1}  # a new start counts from 0
    records[6] |= {"collapsed": 1.0}
    for record in records[7:]:
        record["rollbacks"] = 1
    write(tmp_path, records)
    history = History.read(tmp_path)
    assert [(event.step, event.what.partition(":")[0]) for event in history.events] == [
        (2, "pictures that cannot be decoded (2)"), (4, "steps left out"), (4, "loss spike"),
        (6, "the pruner has collapsed"), (7, "returns to a checkpoint"),
    ]  # fmt: skip
    assert sum(history.num_events.values()) == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": 1}\n{"step": 2\n{"step": 3}\n', "line 2: no JSON object with a `step`"),
        ('{"loss": 1}\n', "line 1: no JSON object"),
        ("[1]\n", "line 1: no JSON object"),
        ('{"step": "x"}\n', "line 1: step 'x'; expected a number"),
        ('{"step": Infinity}\n', "line 1: step inf; expected a number, finite"),
        ("[" * 100_000 + "\n", "line 1: no JSON object"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        History.read(tmp_path)
