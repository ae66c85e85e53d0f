"""What a report holds: plain data, in the order in which it is read.

A report is a title, numbers worth reading first, and sections of blocks (tables, charts, clips, pictures, commands,
lists). It knows no task, robot or benchmark. `html.py` and `markdown.py` write the same data in two forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from prismatic.pictures.images import data_uri
from prismatic.significance import wilson_interval


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        sort: What the column is ordered by, where that is not the text.
        note: Smaller words below the text.
        mark: Sets a tick (True) or a cross (False) behind the text.
        address: Makes the text a link, relative to the report's file and percent-encoded.
        interval: (low, rate, high) in [0, 1], drawn as a bar below the text.
    """

    text: str
    sort: float | None = None
    note: str = ""
    mark: bool | None = None
    address: str = ""
    interval: tuple[float, float, float] | None = None


Row = Sequence[str | Cell]
"""Cells of a table; a plain string is a cell of that text."""


def share_cell(successes: int, trials: int) -> Cell:
    """`3/4 · 75 % (30–95)`: a count, its rate and its Wilson 95 % interval in percent; a dash without trials."""
    if not trials:
        return Cell("–", sort=-1.0)
    rate, interval = successes / trials, wilson_interval(successes, trials)
    text = f"{successes}/{trials} · {100 * rate:.0f} % ({100 * interval.low:.0f}–{100 * interval.high:.0f})"
    return Cell(text, sort=rate, interval=(interval.low, rate, interval.high))


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Args:
        totals: Rows that stay below the others however these are sorted.
        sortable: A click on a column's head orders the rows by it.
        numeric: Columns after the first are set as numbers (right-aligned), otherwise as words.
        folded: Only its heading is shown until a click opens it.
        wide: Takes the whole width also where blocks stand side by side.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    totals: Sequence[Row] = ()
    sortable: bool = False
    numeric: bool = True
    folded: bool = False
    wide: bool = False

    @property
    def cells(self) -> list[list[Cell]]:
        return [[_cell(value) for value in row] for row in self.rows]

    @property
    def total_cells(self) -> list[list[Cell]]:
        return [[_cell(value) for value in row] for row in self.totals]


def _cell(value: str | Cell) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


class Chart(Protocol):
    """A drawing, and the same figures in words.

    Attributes:
        kind: "chart".
        title: What is drawn.
        description: What one sees, for those who do not see it.
        wide: Needs the full width of the page.
    """

    @property
    def kind(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def wide(self) -> bool: ...

    def svg(self) -> str | None:
        """An `<svg>` element in the colours of the page; None when there is nothing to draw."""
        ...

    def table(self) -> Table | None:
        """The figures; None where a table of the same section gives them."""
        ...


@dataclass(frozen=True)
class Media:
    """A picture or a video, inside the page or beside it.

    Args:
        mime: `image/png`, `video/mp4`.
        content: The bytes to embed, or None.
        address: Where the file is, relative to the report's file and percent-encoded; empty when there is none.
    """

    mime: str
    content: bytes | None = None
    address: str = ""

    def __post_init__(self) -> None:
        if self.content is None and not self.address:
            raise ValueError("a Media needs its content or the address of its file")

    @property
    def source(self) -> str:
        """The address for the page: `data:` with the content itself where it is embedded."""
        return self.address if self.content is None else data_uri(self.content, self.mime)


@dataclass(frozen=True)
class Picture:
    """A picture.

    Args:
        description: What is to be seen, for those who do not see it; the title where it is empty.
        own_size: No wider than it is: more would only be coarser.
    """

    kind: ClassVar[str] = "picture"
    title: str
    image: Media
    caption: str = ""
    description: str = ""
    own_size: bool = False


@dataclass(frozen=True)
class Clip:
    """A short video.

    Args:
        picture: Shown below it.
        autoplay: Plays by itself, over and over.
        own_size: No wider than it is.
    """

    kind: ClassVar[str] = "clip"
    title: str
    video: Media
    caption: str = ""
    picture: Picture | None = None
    autoplay: bool = False
    own_size: bool = False


@dataclass(frozen=True)
class CodeBlock:
    kind: ClassVar[str] = "code"
    title: str
    code: str
    note: str = ""


@dataclass(frozen=True)
class Notes:
    """A list of remarks."""

    kind: ClassVar[str] = "notes"
    items: Sequence[str]
    title: str = ""


Block = Table | Picture | Clip | CodeBlock | Notes | Chart


@dataclass(frozen=True)
class Section:
    """Blocks under one heading.

    Args:
        title: Unique in the report.
        note: Stands before the blocks.
        columns: 2 sets blocks side by side where the window is wide enough.
    """

    title: str
    blocks: Sequence[Block]
    note: str = ""
    columns: int = 1


@dataclass(frozen=True)
class Advice:
    """A sentence that ends with the command it speaks of."""

    words: str
    command: str


@dataclass(frozen=True)
class Headline:
    """A number worth reading first: `value` in large type over what it is."""

    value: str
    label: str


@dataclass(frozen=True)
class Live:
    """Of a page that is written again and again: it says how old it is, and looks for a newer one of itself.

    Args:
        written: When (seconds since 1970).
        every_s: How often.
    """

    written: float
    every_s: float


@dataclass(frozen=True)
class ReportData:
    """Everything in a report. What is left empty, sections with neither blocks nor a note included, is left out.

    Args:
        summary: Opening sentences, one paragraph each.
        alerts: What must be known before any number is believed; stands first.
    """

    title: str
    summary: Sequence[str | Advice] = ()
    alerts: Sequence[str] = ()
    headlines: Sequence[Headline] = ()
    sections: Sequence[Section] = ()
    footer: str = ""
    live: Live | None = None

    @property
    def filled(self) -> list[Section]:
        """The sections that have something to show."""
        return [section for section in self.sections if section.blocks or section.note]


def counted(count: int, noun: str) -> str:
    """`1 task`, `2 tasks`, `2 queries`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `1 h 02 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
