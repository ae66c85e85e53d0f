"""For the tests of reports: one with every kind of block, and a parser that reads pages back."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from prismatic.pictures.images import encode_png
from prismatic.pictures.video import write_mp4
from prismatic.report.charts import BandChart, RateBars, StackedBars, band_of
from prismatic.report.data import (
    Cell,
    Clip,
    CodeBlock,
    Headline,
    Media,
    Notes,
    Picture,
    ReportData,
    Section,
    Table,
    share_cell,
)
from prismatic.report.figures import Curve

VOID = {"meta", "img", "br", "path", "use", "rect"}
EVIL = "<b>|*x*</b>`_ & \"quoted\" $x$ <script>alert('x')</script>"
"""Words that would be markup in HTML, Markdown or a chart."""


class Page(HTMLParser):
    """Collects text, addresses and tags, and checks that elements close in order and that no id comes twice."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert not self.open
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(set(ids)) == len(ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "poster", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data.strip())


def write_video(path: Path) -> Path:
    """Two seconds of a square that moves."""
    frames = np.full((20, 64, 96, 3), 90, np.uint8)
    for number, frame in enumerate(frames):
        frame[20:40, 3 * number : 3 * number + 20] = 220
    return write_mp4(path, list(frames), fps=10)


def full_report(video: Path) -> ReportData:
    """A report with every kind of block."""
    png = encode_png(np.full((8, 8, 3), 128, np.uint8))
    rows = [
        (Cell("red", note="as given"), share_cell(3, 4), "10", Cell("file", address="videos/a%20b.mp4")),
        (Cell("blue", note=EVIL), share_cell(0, 4), "9", Cell("at least 2", mark=False)),
        ("green", share_cell(0, 0), "100", "–"),
    ]
    metrics = [{"step": step, "loss": 1 / (step + 1)} for step in range(80)]
    totals = [("all", share_cell(3, 8), "119", "")]
    return ReportData(
        title="A small policy <acts>",
        summary=["It works & is small.", "1. is not a list"],
        alerts=["Incomplete: half of it lacks."],
        headlines=[Headline("3/8", "standard initial states")],
        sections=[
            Section("Success", [
                RateBars("Bars", ["red", EVIL], {"one": [(3, 4), (0, 4)], "two": [(4, 4), (0, 0)]}),
                Table("Colours", ("colour", "solved", "steps", "file"), rows, "Held out.", totals, sortable=True),
            ]),
            Section("Clips", [
                Clip("inside", Media("video/mp4", video.read_bytes(), "videos/inside.mp4"), "solved",
                     Picture("kept", Media("image/png", png, "videos/inside.png"))),
                Clip("beside", Media("video/mp4", None, "videos/beside.mp4"), "not solved"),
            ], columns=2),
            Section("Pictures", [Picture("red", Media("image/png", png), "what is kept", "a grey square")]),
            Section("Cost", [
                BandChart("Kept", {"a": band_of([[9, 8, 7], [7, 6]])}, "policy query", "tokens", 0.2),
                StackedBars("Times", ["a"], {"vision": [3.0], "llm": [4.5]}, "ms"),
                Curve("Loss", {"training": "loss"}, metrics), Curve("Nothing", {"none": "absent"}, metrics),
            ]),
            Section("Run", [CodeBlock("Train", "torchrun --flag '<x>'\n  ```"), Notes(["One seed.", EVIL], "Caveats")]),
            Section("Empty", []),
        ],
        footer="Written in a test.",
    )  # fmt: skip
