from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt
from report_page import EVIL

from prismatic.report.data import Advice, Notes, ReportData, Section, Table
from prismatic.report.markdown import escape, render_markdown, write_markdown


class Rendered(HTMLParser):
    """What a Markdown reader makes of a text: its tables as cells, its tags, its links and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.in_cell = False
        self.feed(MarkdownIt("commonmark").enable("table").render(text))
        self.rows = [[cell.strip() for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.in_cell |= tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.in_cell:
            self.rows[-1][-1] += data


def test_a_reader_finds_the_same_tables(report: ReportData) -> None:
    rendered = Rendered(render_markdown(report))
    (table,) = (block for block in report.sections[0].blocks if isinstance(block, Table))
    for row in (*table.cells, *table.total_cells):
        marks = {True: " ✓", False: " ✗", None: ""}
        expected = [f"{cell.text}{marks[cell.mark]}" + (f" ({cell.note})" if cell.note else "") for cell in row]
        assert expected in rendered.rows
    assert ["policy query", "series", "sequences", "mean", "10th percentile", "90th percentile"] in rendered.rows
    assert ["2", "a", "2", "7.0", "6.2", "7.8"] in rendered.rows


def test_words_stay_words(report: ReportData) -> None:
    assert Rendered(f"a {escape(EVIL)} b").words.strip() == f"a {EVIL} b"
    for text in (
        "_under_ score_d",
        "1. one",
        "# head",
        "- item",
        "+ item",
        "a [link](x) ![p](y)",
        "~~no~~",
        "***",
        "&amp;",
    ):
        rendered = Rendered(render_markdown(ReportData("t", summary=[text], sections=[Section("s", [Notes([text])])])))
        assert rendered.words.count(text) == 2
        assert set(rendered.tags) <= {"h1", "h2", "p", "ul", "li"}
    assert "script" not in Rendered(render_markdown(report)).tags


def test_files_are_linked_and_code_is_fenced(report: ReportData) -> None:
    rendered = Rendered(render_markdown(report))
    addresses = ["videos/a%20b.mp4", "videos/inside.mp4", "videos/inside.png", "videos/beside.mp4"]
    assert rendered.links == addresses  # the picture that is in no file has none
    assert "torchrun --flag '<x>'\n  ```" in rendered.words


def test_write_markdown(report: ReportData, tmp_path: Path) -> None:
    path = write_markdown(report, tmp_path / "deep" / "report.md")
    assert path.read_text(encoding="utf-8") == render_markdown(report)


def test_a_command_stands_in_more_backticks_than_it_has() -> None:
    text = render_markdown(ReportData("t", summary=[Advice("It is *one*:", "make a`b*")]))
    assert r"It is \*one\*: ``make a`b*``" in text
