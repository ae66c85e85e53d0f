import re
from pathlib import Path

import pytest
from report_page import EVIL, Page

from prismatic.report.data import Media, ReportData, Section, Table, duration, share_cell
from prismatic.report.html import render_html, write_report
from prismatic.report.markdown import render_markdown
from prismatic.significance import wilson_interval


def test_page_is_well_formed_and_says_everything(report: ReportData) -> None:
    page = Page(render_html(report))
    text = " ".join(page.text)
    for words in ("A small policy <acts>", "Incomplete", "as given", "Held out.", "torchrun --flag '<x>'", "Caveats",
                  "what is kept", "videos/beside.mp4", "Written in a test."):  # fmt: skip
        assert words in text
    low, high = wilson_interval(3, 4)
    assert f"3/4 · 75 % ({100 * low:.0f}–{100 * high:.0f})" in text
    assert "Nothing" not in text and "Empty" not in text
    assert text.count(EVIL) >= 3  # a cell, a list and a chart
    assert text.index("Incomplete") < text.index("3/8")


def test_headings_tables_and_pictures_are_told_to_those_who_do_not_see(report: ReportData) -> None:
    page = Page(render_html(report))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "video" or attrs.get("role") == "img")
    anchors = {address[1:] for address in page.addresses if address.startswith("#")}
    assert anchors <= {attrs.get("id") for _, attrs in page.tags}


def test_page_loads_nothing_from_elsewhere(report: ReportData) -> None:
    html = render_html(report)
    addresses = Page(html).addresses
    assert all(address.startswith(("data:", "#", "videos/")) for address in addresses)
    assert not re.findall(r"url\(\s*[\"']?(?!#)|@import|<script[^>]|<link", html)
    assert {"videos/beside.mp4", "videos/a%20b.mp4"} <= set(addresses) and "videos/inside.mp4" not in addresses


def test_what_is_empty_is_left_out() -> None:
    page = Page(render_html(ReportData(title="Only a title")))
    assert [tag for tag, _ in page.tags if tag in ("h2", "nav", "table", "section", "footer")] == []


def test_a_section_with_nothing_but_a_note_stays() -> None:
    data = ReportData("t", sections=[Section("Lost", [], "The files of 2 are missing."), Section("Empty", [])])
    page = Page(render_html(data))
    assert page.text.count("Lost") == page.text.count("The files of 2 are missing.") == 1 and "Empty" not in page.text
    assert "## Lost\n\nThe files of 2 are missing." in render_markdown(data) and "Empty" not in render_markdown(data)


def test_write_report_replaces_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(ReportData(title="old"), path)
    write_report(ReportData(title="new"), path)
    assert "<h1>new</h1>" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_share_is_ordered_by_its_rate() -> None:
    shares = [share_cell(0, 0), share_cell(0, 9), share_cell(2, 4), share_cell(9, 9)]
    assert [share.sort for share in shares] == [-1.0, 0.0, 0.5, 1.0] and shares[0].interval is None


def test_strings_are_cells() -> None:
    table = Table("", ("a", "b"), [("x", share_cell(1, 2))], totals=[("y", "z")])
    assert [cell.text[:3] for cell in table.cells[0]] == ["x", "1/2"]
    assert [cell.text for cell in table.total_cells[0]] == ["y", "z"]


def test_media_without_bytes_need_an_address() -> None:
    assert Media("image/png", b"\x00\x01").source == "data:image/png;base64,AAE="
    with pytest.raises(ValueError, match="content or the address"):
        Media("image/png")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
