"""The charts of an evaluation: rates with their intervals, a mean with its band, and what a whole is made of."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from prismatic.report.data import Table
from prismatic.report.figures import (
    COLOURS,
    INK,
    add_legend_above,
    chart_axes,
    legend_shape,
    spread,
    style_spines,
    to_svg,
)
from prismatic.significance import wilson_interval

WIDTH = 6.0  # inches
_LABEL_LETTERS = 66
_LINE, _BAR = 0.17, 0.22  # heights of a line of text and of a bar in inches


@dataclass(frozen=True)
class RateBars:
    """One bar per name and series: a success rate, with its Wilson 95 % interval as a line through the bar's end.

    Args:
        names: What the rates are of (tasks, say), from top to bottom.
        series: Legend label -> (successes, trials) per name; trials 0 draws nothing. Successes are not whole where a
            trial is the mean of several.
    """

    kind: ClassVar[str] = "chart"
    wide: ClassVar[bool] = True
    title: str
    names: Sequence[str]
    series: Mapping[str, Sequence[tuple[float, int]]]

    @property
    def description(self) -> str:
        parts = [
            f"{label + ', ' if len(self.series) > 1 else ''}{name}: {_count_text(successes)} of {trials}"
            for label, counts in self.series.items()
            for name, (successes, trials) in zip(self.names, counts, strict=True)
        ]
        return f"{self.title}. {'; '.join(parts)}"

    def table(self) -> Table | None:
        return None  # the success table stands beside it

    def svg(self) -> str | None:
        if not self.names or not any(trials for counts in self.series.values() for _, trials in counts):
            return None
        tops, height = _row_tops(self.names, len(self.series))
        legend_columns, legend_height = legend_shape(list(self.series))
        with chart_axes(WIDTH, height + 0.65 + legend_height) as axes:
            drawn = {
                label: _draw_rates(axes, counts, np.array(tops) + (number + 0.5) * _BAR, COLOURS[number % len(COLOURS)])
                for number, (label, counts) in enumerate(self.series.items())
            }
            _style_rows(axes, self.names, tops, height)
            axes.set_xlim(0, 1.12)
            axes.set_xticks(np.linspace(0, 1, 6))
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlabel("success rate, with Wilson 95 % interval", color=INK)
            if legend_columns:
                add_legend_above(axes, legend_columns, drawn)
            return to_svg(axes, self.description)


def _count_text(successes: float) -> str:
    return f"{successes:.1f}".removesuffix(".0")


def _row_tops(names: Sequence[str], bars: int) -> tuple[list[float], float]:
    """Where the bars of each name begin, below the name, and the height of all, in inches from the top."""
    tops, y = [], 0.05
    for name in names:
        y += _LINE * len(textwrap.wrap(name, _LABEL_LETTERS)) + 0.04
        tops.append(y)
        y += bars * _BAR + 0.16
    return tops, y


def _style_rows(axes: Any, names: Sequence[str], tops: Sequence[float], height: float) -> None:
    """Names above their bars, so that the bars have the whole width; the y axis counts inches."""
    for name, top in zip(names, tops, strict=True):
        axes.text(0, top - 0.03, textwrap.fill(name, _LABEL_LETTERS), va="bottom", color=INK)
    axes.set_ylim(height, 0)
    style_spines(axes, ("bottom",))
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")


def _draw_rates(axes: Any, counts: Sequence[tuple[float, int]], middles: NDArray[np.float64], colour: str) -> Any:
    """The bars, for the legend."""
    places = [place for place, (_, trials) in enumerate(counts) if trials]
    rates = np.array([counts[place][0] / counts[place][1] for place in places])
    intervals = [wilson_interval(*counts[place]) for place in places]
    low, high, y = [i.low for i in intervals], [i.high for i in intervals], middles[places]
    bars = axes.barh(y, rates, 0.84 * _BAR, color=colour, alpha=0.55)
    axes.hlines(y, low, high, color=INK, linewidth=1.3)
    for end in (low, high):
        axes.vlines(end, y - 0.2 * _BAR, y + 0.2 * _BAR, color=INK, linewidth=1.3)
    axes.plot(rates, y, "o", color=colour, markersize=5, markeredgecolor=INK, markeredgewidth=0.8, clip_on=False)
    for height, place in zip(y, places, strict=True):
        successes, trials = counts[place]
        axes.text(1.02, height, f"{_count_text(successes)}/{trials}", va="center", fontsize=9, color=INK)
    return bars


@dataclass(frozen=True)
class Band:
    """A mean over sequences that end at different times, element by element, and how far they spread around it.

    Args:
        mean: (N,) Over the sequences that are long enough.
        low: (N,) Lower edge of the band; `high` (N,) the upper one.
        count: (N,) How many sequences are that long.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    count: NDArray[np.int64]


def band_of(sequences: Sequence[Sequence[float]]) -> Band:
    """Mean and 10th to 90th percentile at every place, over the sequences that reach it."""
    length = max((len(sequence) for sequence in sequences), default=0)
    columns = [[float(s[place]) for s in sequences if len(s) > place] for place in range(length)]
    edges = np.array([np.percentile(column, (10, 90)) for column in columns]).reshape(-1, 2)
    mean = np.array([np.mean(column) for column in columns])
    return Band(mean, edges[:, 0], edges[:, 1], np.array([len(column) for column in columns], np.int64))


@dataclass(frozen=True)
class BandChart:
    """Means with their bands over a counter that begins at 1; dotted where fewer than half of the sequences go on.

    Args:
        series: Legend label -> band.
        counter: What is counted, the x axis.
        unit: Label of the y axis.
        seconds_per_count: Adds an axis in seconds above, where it is known.
        top: Where the y axis ends; None: above the highest band.
    """

    kind: ClassVar[str] = "chart"
    wide: ClassVar[bool] = True
    title: str
    series: Mapping[str, Band]
    counter: str
    unit: str
    seconds_per_count: float | None = None
    top: float | None = None

    @property
    def description(self) -> str:
        parts = [
            f"{label}: {band.mean[0]:.1f} at the first {self.counter}, {band.mean.min():.1f} to {band.mean.max():.1f} "
            "on the way"
            for label, band in self.series.items()
            if band.mean.size
        ]
        return f"{self.title}. {'; '.join(parts)}"

    def table(self) -> Table | None:
        """At most a dozen places of each line."""
        rows = [
            (
                str(place + 1),
                label,
                str(band.count[place]),
                *(f"{v[place]:.1f}" for v in (band.mean, band.low, band.high)),
            )
            for label, band in self.series.items()
            for place in spread(band.mean.size)
        ]
        columns = (self.counter, "series", "sequences", "mean", "10th percentile", "90th percentile")
        return Table(self.title, columns, rows) if rows else None

    def svg(self) -> str | None:
        bands = {label: band for label, band in self.series.items() if band.mean.size}
        if not bands:
            return None
        legend_columns, legend_height = legend_shape(list(bands))
        with chart_axes(WIDTH, 3.4 + legend_height) as axes:
            drawn = {
                label: _draw_band(axes, band, COLOURS[number % len(COLOURS)])
                for number, (label, band) in enumerate(bands.items())
            }
            axes.set_ylim(0, self.top or 1.08 * max(band.high.max() for band in bands.values()))
            axes.set_xlim(left=1)
            axes.set_xlabel(self.counter, color=INK)
            axes.set_ylabel(self.unit, color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
            if self.seconds_per_count:
                _add_seconds(axes, self.seconds_per_count)
            if legend_columns:
                add_legend_above(axes, legend_columns, drawn)
            return to_svg(axes, self.description)


def _draw_band(axes: Any, band: Band, colour: str) -> Any:
    """The line of the mean, for the legend."""
    places = np.arange(1, band.mean.size + 1)
    common = int((2 * band.count >= band.count[0]).sum())  # counts only fall
    marker = "o" if common == 1 else None
    axes.fill_between(places[:common], band.low[:common], band.high[:common], color=colour, alpha=0.22, linewidth=0)
    (line,) = axes.plot(places[:common], band.mean[:common], color=colour, linewidth=1.9, marker=marker)
    axes.plot(places[common - 1 :], band.mean[common - 1 :], color=colour, linewidth=1.4, alpha=0.8, linestyle=":")
    return line


def _add_seconds(axes: Any, seconds: float) -> None:
    """An axis above, in seconds since the first policy query."""
    above = axes.secondary_xaxis("top", functions=(lambda x: (x - 1) * seconds, lambda x: x / seconds + 1))
    above.set_xlabel("seconds", color=INK)
    above.tick_params(colors=INK, length=3)
    style_spines(above, ("top",))


@dataclass(frozen=True)
class StackedBars:
    """What a whole is made of: one bar per name, its parts side by side.

    Args:
        parts: Legend label -> one value per name.
        unit: Label of the x axis.
    """

    kind: ClassVar[str] = "chart"
    wide: ClassVar[bool] = True
    title: str
    names: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    unit: str

    @property
    def description(self) -> str:
        bars = [
            f"{name}: " + ", ".join(f"{part} {values[place]:.1f}" for part, values in self.parts.items())
            for place, name in enumerate(self.names)
        ]
        return f"{self.title}, {self.unit}. {'; '.join(bars)}"

    def table(self) -> Table | None:
        return None  # the table of percentiles beside it has the means too

    def svg(self) -> str | None:
        if not self.names or not self.parts:
            return None
        tops, height = _row_tops(self.names, 1)
        legend_columns, legend_height = legend_shape(list(self.parts))
        with chart_axes(WIDTH, height + 0.65 + legend_height) as axes:
            middles = np.array(tops) + _BAR / 2
            left, drawn = np.zeros(len(self.names)), {}
            for number, (part, values) in enumerate(self.parts.items()):
                colour = COLOURS[number % len(COLOURS)]
                drawn[part] = axes.barh(middles, values, 0.84 * _BAR, left=left, color=colour, alpha=0.85)
                left += np.asarray(values)
            for middle, total in zip(middles, left, strict=True):
                axes.text(total + 0.01 * left.max(), middle, f"{total:.1f}", va="center", fontsize=9, color=INK)
            _style_rows(axes, self.names, tops, height)
            axes.set_xlim(0, 1.12 * left.max() or 1.0)
            axes.set_xlabel(self.unit, color=INK)
            if legend_columns:
                add_legend_above(axes, legend_columns, drawn)
            return to_svg(axes, self.description)
