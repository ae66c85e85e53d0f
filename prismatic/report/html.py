"""One self-contained HTML page that tells what was trained, how it acts, and at what cost.

The page knows no task, robot or benchmark: whoever writes a report fills `ReportData` with plain data. Nothing is
loaded from elsewhere, so the file can be mailed and opened offline.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prismatic.report.figures import Curve, curve_svg
from prismatic.significance import Interval, wilson_interval
from prismatic.visualization import data_uri


@dataclass(frozen=True)
class Headline:
    """A number worth reading first: `value` in large type over what it is."""

    value: str
    label: str


@dataclass(frozen=True)
class SuccessRow:
    """Successes under one condition.

    Args:
        name: The condition.
        counts: Column (a task, say) -> (successes, trials).
        note: What the condition is, in a few words.
        expected: What was asked for, as text; `met` says whether it holds (None: not judged).
    """

    name: str
    counts: Mapping[str, tuple[int, int]]
    note: str = ""
    expected: str = ""
    met: bool | None = None

    @property
    def successes(self) -> int:
        return sum(successes for successes, _ in self.counts.values())

    @property
    def trials(self) -> int:
        return sum(trials for _, trials in self.counts.values())

    @property
    def rate(self) -> float:
        """Share of successes; 0 without trials."""
        return self.successes / self.trials if self.trials else 0.0

    @property
    def interval(self) -> Interval:
        """Wilson 95 % interval of the rate."""
        return wilson_interval(self.successes, self.trials)


@dataclass(frozen=True)
class SuccessTable:
    title: str
    rows: Sequence[SuccessRow]
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in order of first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row.counts))

    @property
    def has_expectations(self) -> bool:
        return any(row.expected for row in self.rows)


@dataclass(frozen=True)
class Picture:
    title: str
    png: bytes
    caption: str = ""

    @property
    def source(self) -> str:
        return data_uri(self.png, "image/png")


@dataclass(frozen=True)
class Clip:
    """A short video.

    Args:
        poster: PNG that stands there before it plays.
    """

    title: str
    mp4: bytes
    caption: str = ""
    poster: bytes | None = None

    @property
    def source(self) -> str:
        return data_uri(self.mp4, "video/mp4")

    @property
    def poster_source(self) -> str:
        return data_uri(self.poster, "image/png") if self.poster else ""


@dataclass(frozen=True)
class Table:
    """Any other table. Cells after the first column are set as numbers (right-aligned)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class CodeBlock:
    title: str
    code: str
    note: str = ""


@dataclass
class ReportData:
    """Everything on the page. What is left empty is left out.

    Args:
        summary: Opening sentences, one paragraph each.
        metrics: Training log, one mapping per record, with `step`; see `read_metrics`.
        curves: Which charts to draw from `metrics`.
        performance: Cost tables: FLOPs, latency, memory, with and without pruning.
        stages: (stage, seconds).
        versions: Software and machine, as it was recorded.
        notes: Remarks and caveats.
    """

    title: str
    summary: Sequence[str] = ()
    headlines: Sequence[Headline] = ()
    success: Sequence[SuccessTable] = ()
    pictures: Sequence[Picture] = ()
    clips: Sequence[Clip] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Curve] = ()
    performance: Sequence[Table] = ()
    commands: Sequence[CodeBlock] = ()
    stages: Sequence[tuple[str, float]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    footer: str = ""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file. A last line that was cut off by a killed writer is left out.

    Raises:
        ValueError: when any earlier line is not JSON; names file and line.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return records


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `1 h 02 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def render_html(data: ReportData) -> str:
    """The page as text. All strings in `data` are escaped; charts are drawn here."""
    environment = Environment(
        loader=PackageLoader("prismatic.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    charts = [(curve.title, svg) for curve in data.curves if (svg := curve_svg(curve, data.metrics))]
    charts_safe = [(title, Markup(svg)) for title, svg in charts]
    return environment.get_template("template.html").render(data=data, charts=charts_safe)


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the page to `path`, atomically: readers see the old page or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render_html(data), encoding="utf-8")
    os.replace(partial, path)
    return path
