"""Line charts as inline SVG that takes the page's own text colour, so that one file reads well in light and dark."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

COLOURS = ("#3d7dd8", "#d9822b", "#3f9d63", "#b0519b")
"""Line colours that hold on white and on near-black."""

_INK = "#123457"  # Stands for the page's text colour until the SVG is written.
_SMOOTH_FROM = 60  # Points from which on a running mean is drawn over the faint raw line.


@dataclass(frozen=True)
class Curve:
    """One chart over the training steps.

    Args:
        title: What is drawn, in words.
        keys: Legend label -> key in the metrics records; records without the key are left out.
        unit: Label of the y axis.
        log_scale: Logarithmic y axis.
    """

    title: str
    keys: Mapping[str, str]
    unit: str = ""
    log_scale: bool = False


def points_of(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite number under `key`, in order of steps."""
    pairs = sorted(
        (float(record["step"]), float(record[key]))
        for record in metrics
        if "step" in record and isinstance(record.get(key), (int, float)) and np.isfinite(record[key])
    )
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def curve_svg(curve: Curve, metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """The chart as an `<svg>` element; None when no record has any of the keys.

    Args:
        metrics: One mapping per logged step, with `step` and any number of named values.
    """
    series = {label: points_of(metrics, key) for label, key in curve.keys.items()}
    series = {label: points for label, points in series.items() if points[0].size}
    if not series:
        return None
    options: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": curve.title,
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for colour, (label, (steps, values)) in zip(COLOURS * len(series), series.items(), strict=False):
            _draw_line(axes, steps, values, label, colour)
        _style_axes(axes, curve, len(series))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().replace(_INK, "currentColor")
    return text[text.index("<svg") :]


def _draw_line(axes: Any, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    if steps.size < _SMOOTH_FROM:
        marker = "o" if steps.size < 20 else None
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label, marker=marker, markersize=3)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(steps, running_mean(values, max(5, steps.size // 25)), color=colour, linewidth=1.8, label=label)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window that shrinks at the ends, (N,) -> (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    half = np.minimum(window // 2, np.minimum(index, values.size - 1 - index))
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _style_axes(axes: Any, curve: Curve, lines: int) -> None:
    if curve.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("optimiser step", color=_INK)
    axes.set_ylabel(curve.unit, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(colors=_INK, which="both", length=3)
    axes.grid(alpha=0.18, color=_INK, linewidth=0.6)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_INK)
        spine.set_alpha(0.5)
    if lines > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
