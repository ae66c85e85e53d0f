import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from prismatic.report.figures import Curve, curve_svg, points_of, running_mean
from prismatic.report.html import (
    Clip,
    CodeBlock,
    Headline,
    Picture,
    ReportData,
    SuccessRow,
    SuccessTable,
    Table,
    duration,
    read_metrics,
    render_html,
    write_report,
)
from prismatic.significance import wilson_interval
from prismatic.visualization import encode_png

VOID = {"meta", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects text and addresses, and checks that elements close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "poster", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "poster", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def full_report() -> ReportData:
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    rows = [
        SuccessRow("standard", {"red": (11, 12), "blue": (12, 12)}, note="as given", expected="at least 20", met=True),
        SuccessRow("wide", {"red": (3, 12)}, expected="at least 20", met=False),
    ]
    return ReportData(
        title="A small policy <acts>",
        summary=["It works & is small."],
        headlines=[Headline("23/24", "standard starts")],
        success=[SuccessTable("By condition", rows, note="Held-out starts.")],
        pictures=[Picture("red", png, "what is kept")],
        clips=[Clip("red", b"not really a video", poster=png)],
        metrics=[{"step": step, "loss": 1 / (step + 1), "tokens_kept": 90 - step} for step in range(80)],
        curves=[Curve("Loss", {"training": "loss"}), Curve("Nothing", {"none": "absent"})],
        performance=[Table("FLOPs", ["part", "all", "pruned"], [["vision", "1.0 G", "1.0 G"]])],
        commands=[CodeBlock("Train", "torchrun --flag '<x>'\n  --next")],
        stages=[("collect", 61.0), ("train", 3600.0)],
        versions={"torch": "2"},
        notes=["One seed."],
        footer="Written in a test.",
    )


def test_page_is_well_formed_and_says_everything() -> None:
    page = Page(render_html(full_report()))
    text = " ".join(page.text)
    for words in (
        "A small policy <acts>",
        "23/24",
        "11/12",
        "as given",
        "Held-out",
        "torchrun --flag '<x>'",
        "1 h 01 min",
    ):
        assert words in text
    low, high = wilson_interval(23, 24)
    assert f"({100 * low:.0f}–{100 * high:.0f})" in text
    assert "Nothing" not in text


def test_page_loads_nothing_from_elsewhere() -> None:
    html = render_html(full_report())
    assert all(address.startswith(("data:", "#")) for address in Page(html).addresses)
    assert not re.findall(r"(?:src|href)=[\"']?https?:|url\(\s*[\"']?http|@import|<script|<link", html)


def test_what_is_empty_is_left_out() -> None:
    text = " ".join(Page(render_html(ReportData(title="Only a title"))).text)
    for heading in ("Success", "Rollouts", "Training", "Cost", "Commands", "Run", "Notes"):
        assert heading not in text


def test_write_report_replaces_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(ReportData(title="old"), path)
    write_report(ReportData(title="new"), path)
    assert "<h1>new</h1>" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_success_row_adds_up() -> None:
    row = SuccessRow("x", {"a": (1, 2), "b": (3, 4)})
    assert (row.successes, row.trials, row.interval) == (4, 6, wilson_interval(4, 6))
    assert SuccessRow("empty", {}).rate == 0.0


def test_curves_take_the_colour_of_the_page() -> None:
    svg = curve_svg(
        Curve("Loss", {"training": "loss", "held out": "val"}), [{"step": 1, "loss": 2.0}, {"step": 2, "val": 3}]
    )
    assert svg is not None and svg.startswith("<svg") and "currentColor" in svg and "held out" in svg
    assert curve_svg(Curve("Loss", {"training": "loss"}), [{"step": 1}]) is None


def test_points_are_sorted_and_finite() -> None:
    steps, values = points_of([{"step": 3, "a": 1}, {"step": 1, "a": 2}, {"step": 2, "a": float("nan")}, {"a": 3}], "a")
    assert steps.tolist() == [1, 3] and values.tolist() == [2, 1]


def test_running_mean_equals_the_plain_loop() -> None:
    values = np.random.default_rng(0).normal(size=31)
    found = running_mean(values, 7)
    for index in range(31):
        half = min(3, index, 30 - index)
        assert found[index] == pytest.approx(values[index - half : index + half + 1].mean())


def test_read_metrics_forgives_only_a_cut_off_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"st', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
