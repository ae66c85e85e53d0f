"""Charts as inline SVG that takes the page's own text colour, so that one file reads well in light and dark."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from prismatic.report.data import Table

COLOURS = ("#3d7dd8", "#d9822b", "#3f9d63", "#b0519b", "#8a8f2f", "#2f9aa5", "#c2554b", "#7a6bd1")
"""Colours that hold on white and on near-black."""

INK = "#123457"
"""Stands for the page's text colour until the SVG is written."""

_TABLE_ROWS = 12
_LEGEND_LETTERS = 78  # that fit beside each other above a wide chart
_NARROW_LETTERS = 64  # and above a narrow one
_LINES_INSIDE = 3  # lines of a narrow chart whose legend finds a place among them
_TICKED = 6  # measured steps that are so few are what the x axis names
_SMOOTH_FROM = 60  # Points from which on a running mean is drawn over the faint raw line.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
}
"""Of every figure here: matplotlib's settings while it is made. Words may come from anywhere, so `$` is a letter."""

_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@contextmanager
def chart_axes(width: float, height: float) -> Iterator[Any]:
    """Axes of a new figure of so many inches, styled for the page; see `to_svg`."""
    with matplotlib.rc_context(STYLE):
        axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
        axes.tick_params(colors=INK, which="both", length=3)
        axes.grid(alpha=0.18, color=INK, linewidth=0.6)
        axes.set_axisbelow(True)
        style_spines(axes)
        yield axes


def style_spines(axes: Any, shown: Sequence[str] = ("left", "bottom")) -> None:
    for name, spine in axes.spines.items():
        spine.set_visible(name in shown)
        spine.set_color(INK)
        spine.set_alpha(0.5)


def add_legend(axes: Any, entries: Mapping[str, Any]) -> None:
    """A legend inside the axes, where there is room; `entries`: label -> what was drawn.

    Labels are always given: those that matplotlib gathers by itself lack all that begin with `_`.
    """
    axes.legend(list(entries.values()), list(entries), frameon=False, labelcolor=INK, fontsize=9)


def legend_shape(labels: Sequence[str]) -> tuple[int, float]:
    """Columns of a legend above a wide chart, and the inches that it takes in height; (0, 0) for a single label."""
    if len(labels) < 2:
        return 0, 0.0
    one_row = sum(7 + len(label) for label in labels) <= _LEGEND_LETTERS
    columns = len(labels) if one_row else max(1, _LEGEND_LETTERS // (7 + max(map(len, labels))))
    return columns, 0.12 + 0.2 * -(-len(labels) // columns)


def add_legend_above(axes: Any, columns: int, entries: Mapping[str, Any]) -> None:
    """A legend over the whole width of the figure, above the axes; see `legend_shape` and `add_legend`."""
    style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9, "ncols": columns}
    axes.figure.legend(list(entries.values()), list(entries), loc="outside upper left", **style)


def to_svg(axes: Any, description: str) -> str:
    """The figure of the axes as an `<svg>` element whose ids no other chart of the page has."""
    salt = hashlib.sha256(description.encode()).hexdigest()[:10]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        buffer = io.StringIO()
        axes.figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue().replace(INK, "currentColor")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>c{salt}-", text)
    return text[text.index("<svg") :]


@dataclass(frozen=True)
class Curve:
    """One chart over the training steps.

    Args:
        title: What is drawn, in words.
        keys: Legend label -> key in the metrics records; records without the key are left out.
        metrics: One mapping per logged step, with `step` and any number of named values; see `read_metrics`.
        unit: Label of the y axis.
        log_scale: Logarithmic y axis.
    """

    kind: ClassVar[str] = "chart"
    wide: ClassVar[bool] = False
    title: str
    keys: Mapping[str, str]
    metrics: Sequence[Mapping[str, Any]]
    unit: str = ""
    log_scale: bool = False

    @property
    def series(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Legend label -> steps and values; keys that no record has are left out."""
        found = {label: points_of(self.metrics, key) for label, key in self.keys.items()}
        return {label: points for label, points in found.items() if points[0].size}

    @property
    def description(self) -> str:
        ends = [f"{label} {values[0]:.3g} to {values[-1]:.3g}" for label, (_, values) in self.series.items()]
        return f"{self.title}, over optimiser steps: {'; '.join(ends)}"

    def svg(self) -> str | None:
        """The chart; None when no record has any of the keys."""
        series = self.series
        if not series:
            return None
        columns = _columns_above(list(series))
        rows = -(-len(series) // columns) if columns else 0
        with chart_axes(5.2, 3.0 + 0.2 * rows) as axes:
            drawn = {
                label: _draw_line(axes, steps, values, colour)
                for colour, (label, (steps, values)) in zip(COLOURS * len(series), series.items(), strict=False)
            }
            _style_curve(axes, self)
            if columns:
                add_legend_above(axes, columns, drawn)
            elif len(series) > 1:
                add_legend(axes, drawn)
            return to_svg(axes, self.description)

    def table(self) -> Table | None:
        """At most a dozen points of each line."""
        rows = [
            (f"{steps[index]:g}", label, f"{values[index]:.4g}")
            for label, (steps, values) in self.series.items()
            for index in spread(steps.size)
        ]
        return Table(self.title, ("optimiser step", "line", self.unit or "value"), rows) if rows else None


def _columns_above(labels: Sequence[str]) -> int:
    """Columns of a legend above a narrow chart; 0 for as few lines as leave room for one among them."""
    return 0 if len(labels) <= _LINES_INSIDE else max(1, _NARROW_LETTERS // (6 + max(map(len, labels))))


def spread(count: int, most: int = _TABLE_ROWS) -> list[int]:
    """At most so many indices below `count`, evenly from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def points_of(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite number under `key`, in order of steps."""
    pairs = sorted(
        (float(record["step"]), float(record[key]))
        for record in metrics
        if "step" in record and isinstance(record.get(key), (int, float)) and np.isfinite(record[key])
    )
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _draw_line(axes: Any, steps: np.ndarray, values: np.ndarray, colour: str) -> Any:
    """The line that the legend names."""
    if steps.size < _SMOOTH_FROM:
        marker = "o" if steps.size < 20 else None
        return axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3)[0]
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    return axes.plot(steps, running_mean(values, max(5, steps.size // 25)), color=colour, linewidth=1.8)[0]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window that shrinks at the ends, (N,) -> (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    half = np.minimum(window // 2, np.minimum(index, values.size - 1 - index))
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _style_curve(axes: Any, curve: Curve) -> None:
    if curve.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(min(0.0, low), max(high, 1.04 * axes.dataLim.y1))  # a level line is not the frame's
    axes.set_xlabel("optimiser step", color=INK)
    axes.set_ylabel(curve.unit, color=INK)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))  # steps are counted from 0
    steps = np.unique(np.concatenate([steps for steps, _ in curve.series.values()]))
    if 1 < steps.size <= _TICKED and np.diff(steps).min() >= steps[-1] / 8:
        axes.set_xticks([0.0, *steps] if steps[0] >= steps[-1] / 8 else steps)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


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
