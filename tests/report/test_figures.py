import re
from pathlib import Path

import numpy as np
import pytest

from prismatic.report.figures import Curve, legend_shape, points_of, read_metrics, running_mean, spread


def test_curves_take_the_colour_of_the_page() -> None:
    metrics = [{"step": 1, "loss": 2.0}, {"step": 2, "val": 3}]
    svg = Curve("Loss", {"training": "loss", "held out": "val"}, metrics).svg()
    assert svg is not None and svg.startswith("<svg") and "currentColor" in svg and "held out" in svg
    empty = Curve("Loss", {"training": "loss"}, [{"step": 1}])
    assert empty.svg() is None and empty.table() is None


def test_a_curve_is_a_table_too() -> None:
    metrics = [{"step": step, "loss": step**2} for step in range(100)]
    table = Curve("Loss", {"training": "loss"}, metrics).table()
    assert table is not None and len(table.rows) == 12
    assert table.rows[0] == ("0", "training", "0") and table.rows[-1] == ("99", "training", "9801")


def test_the_few_steps_that_were_measured_are_named_from_0_on() -> None:
    ticks = re.compile(r"<text [^>]*middle[^>]*>([0-9]+)</text>")
    few = Curve("L1", {"x": "x"}, [{"step": step, "x": 1.0} for step in (150, 300, 450)]).svg()
    assert few is not None and ticks.findall(few) == ["0", "150", "300", "450"]
    close = Curve("L1", {"x": "x"}, [{"step": step, "x": 1.0} for step in (1, 2, 3, 1000)]).svg()
    assert close is not None and "1" not in ticks.findall(close) and "1000" in ticks.findall(close)


def test_points_are_sorted_and_finite() -> None:
    steps, values = points_of([{"step": 3, "a": 1}, {"step": 1, "a": 2}, {"step": 2, "a": float("nan")}, {"a": 3}], "a")
    assert steps.tolist() == [1, 3] and values.tolist() == [2, 1]


def test_running_mean_equals_the_plain_loop() -> None:
    values = np.random.default_rng(0).normal(size=31)
    found = running_mean(values, 7)
    for index in range(31):
        half = min(3, index, 30 - index)
        assert found[index] == pytest.approx(values[index - half : index + half + 1].mean())


def test_spread_has_both_ends_and_no_doubles() -> None:
    assert spread(0) == [] and spread(1) == [0] and spread(5) == [0, 1, 2, 3, 4]
    many = spread(1000)
    assert len(many) == 12 and (many[0], many[-1]) == (0, 999) and sorted(set(many)) == many


def test_long_labels_stand_below_each_other() -> None:
    assert legend_shape(["a"]) == (0, 0.0)
    assert legend_shape(["a", "b", "c"])[0] == 3
    assert legend_shape(["a" * 60, "b" * 60])[0] == 1


def test_read_metrics_forgives_only_a_cut_off_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"st', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
