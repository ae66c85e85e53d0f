"""Figures of what a pruner keeps: heat maps over the cameras' mean pictures, and charts over an episode."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from prismatic.report.figures import COLOURS
from prismatic.visualization import CROP_AREA, PANEL_SIZE, PruningTrace, resize

COLOUR_MAP = "inferno"
MAX_NAMED = 8
DPI = 150

_OPACITY = (0.1, 0.85)  # of the patch with the lowest value, and of the one with the highest
_STYLE: dict[Any, Any] = {"font.family": "sans-serif", "font.size": 10}


def keep_shares(traces: Sequence[PruningTrace]) -> NDArray[np.float64]:
    """(I, G, G): the share of all looks in which each patch was kept, every look counting once.

    Raises:
        ValueError: without traces, and when their cameras or grids differ.
    """
    check_alike(traces)
    return np.concatenate([trace.grids for trace in traces]).mean(axis=0)


def mean_scores(traces: Sequence[PruningTrace]) -> NDArray[np.float64]:
    """(I, G, G): the best score that any query gave each patch, averaged over all looks.

    Raises:
        ValueError: as `keep_shares`, and when a trace has no scores.
    """
    check_alike(traces)
    if unscored := [trace.title for trace in traces if trace.scores is None]:
        raise ValueError(f"no scores: {unscored}; pruners other than LightVLA's and LightVLA*'s give none")
    scores = np.concatenate([trace.scores for trace in traces if trace.scores is not None])
    return scores.astype(np.float64).mean(axis=0).reshape(traces[0].grids.shape[1:])


def check_alike(traces: Sequence[PruningTrace]) -> None:
    """Raises ValueError for traces that cannot share one map: none, or of different cameras, grids or crops."""
    shapes = {(trace.cameras, trace.grids.shape[1:], trace.center_crop) for trace in traces}
    if len(shapes) != 1:
        listed = [f"{', '.join(names)}: {grid}, {'cropped' if crop else 'whole'}" for names, grid, crop in shapes]
        raise ValueError(
            "one map needs episodes of equal cameras, grids of patches and crops; got "
            f"{'; '.join(sorted(listed)) or 'no episode'}. Draw them one by one"
        )


def mean_pictures(traces: Sequence[PruningTrace], size: int = PANEL_SIZE) -> NDArray[np.float64]:
    """(I, size, size) grey levels in [0, 1]: each camera's pictures, averaged over all looks."""
    looks = sum(trace.num_looks for trace in traces)
    total = np.zeros((len(traces[0].cameras), size, size))
    for trace in traces:
        for camera, pictures in enumerate(trace.images):
            total[camera] += sum(resize(picture, size).mean(axis=2) for picture in pictures)
    return total / (255 * looks)


def keep_map(traces: Sequence[PruningTrace], title: str) -> Figure:
    """How often each patch was kept, a panel per camera over the mean picture. Raises ValueError as `keep_shares`."""
    shares = keep_shares(traces)
    headings = [f"{share.sum():.1f} of {share.size} patches a look" for share in shares]
    scale = Normalize(0.0, max(float(shares.max()), 1e-6))
    figure, row = _patch_map(traces, title, shares, [scale] * len(shares), headings)
    bar = figure.colorbar(ScalarMappable(scale, COLOUR_MAP), ax=row, fraction=0.04, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.set_label("share of looks in which the patch was kept")
    return figure


def score_map(traces: Sequence[PruningTrace], title: str) -> Figure:
    """The best score that any query gave each patch, on average; every camera has its own scale.

    Raises:
        ValueError: as `mean_scores`.
    """
    scores = mean_scores(traces)
    scales = [Normalize(float(score.min()), float(score.max())) for score in scores]
    figure, row = _patch_map(traces, title, scores, scales, ["best score of any query"] * len(scores))
    for axes, scale in zip(row, scales, strict=True):
        figure.colorbar(ScalarMappable(scale, COLOUR_MAP), ax=axes, fraction=0.04, pad=0.02)
    return figure


def _patch_map(
    traces: Sequence[PruningTrace],
    title: str,
    values: NDArray[np.float64],
    scales: Sequence[Normalize],
    headings: Sequence[str],
) -> tuple[Figure, list[Any]]:
    """Values (I, G, G) in colour over the mean pictures; the figure and its panels."""
    # The grid covers what the policy saw, which is the central part where it crops.
    margin = (1 - math.sqrt(CROP_AREA)) / 2 if traces[0].center_crop else 0.0
    seen = (margin, 1 - margin, 1 - margin, margin)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7 * len(values) + 0.9, 4.1), layout="constrained")
        figure.suptitle(title, fontsize=11)
        row = list(figure.subplots(1, len(values), squeeze=False)[0])
        for number, (axes, picture) in enumerate(zip(row, mean_pictures(traces), strict=True)):
            share = np.sqrt(np.clip(scales[number](values[number]), 0.0, 1.0))
            opacity = _OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * share
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
            axes.imshow(
                values[number], cmap=COLOUR_MAP, norm=scales[number], alpha=opacity, extent=seen,
                interpolation="nearest",
            )  # fmt: skip
            axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
            axes.set_title(f"{traces[0].cameras[number]}: {headings[number]}", fontsize=10)
    return figure, row


def kept_chart(trace: PruningTrace) -> Figure:
    """Tokens kept at each look of an episode, in all and per camera.

    Below, where there are scores, what sets kept tokens apart: the median and the middle 80 % of the best scores of
    kept and of pruned tokens.
    """
    counts = trace.grids.sum(axis=(2, 3))
    lines = {"all cameras": counts.sum(axis=1)}
    if len(trace.cameras) > 1:
        lines |= dict(zip(trace.cameras, counts.T, strict=True))
    rows = 1 if trace.scores is None else 2
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 1.0 + 2.4 * rows), layout="constrained")
        figure.suptitle(trace.title, fontsize=11)
        panels = list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])
        for number, (label, values) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            panels[0].plot(trace.steps, values, color=colour, label=label, linewidth=1.8, marker="o", markersize=3)
        panels[0].set_ylabel(f"tokens kept of {trace.kept.shape[1]}")
        panels[0].set_ylim(0, 1.25 * max(values.max() for values in lines.values()))
        panels[0].legend(frameon=False, fontsize=9, ncols=len(lines), loc="upper left")
        if trace.scores is not None:
            _draw_scores(panels[1], trace.steps, trace.scores, trace.kept)
        _style_axes(panels)
    return figure


def _draw_scores(axes: Any, steps: NDArray[np.int64], scores: NDArray[np.float32], kept: NDArray[np.bool_]) -> None:
    for label, colour, mask in (("kept", COLOURS[2], kept), ("pruned", COLOURS[3], ~kept)):
        some = mask.any(axis=1)  # Nothing is pruned where everything is kept.
        if not some.any():
            continue
        chosen = np.where(mask, scores, np.nan)[some]
        low, median, high = np.nanquantile(chosen, [0.1, 0.5, 0.9], axis=1)
        axes.fill_between(steps[some], low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps[some], median, color=colour, label=f"{label} tokens", linewidth=1.8)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.2 * (top - bottom))  # room for the legend
    axes.set_ylabel("best score of any query")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")


def compare_chart(traces: Sequence[PruningTrace], names: Sequence[str]) -> Figure:
    """Tokens kept at each look, a line per episode; named where there are few, and with the mean of all looks."""
    few = len(traces) <= MAX_NAMED
    mean = float(np.concatenate([trace.kept for trace in traces]).sum(axis=1).mean())
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.4 + (0.12 * len(traces) if few else 0.0)), layout="constrained")
        figure.suptitle(f"{len(traces)} episodes", fontsize=11)
        axes = figure.subplots()
        for number, (trace, name) in enumerate(zip(traces, names, strict=True)):
            look: dict[str, Any] = {"color": "0.5", "alpha": 0.35}
            if few:
                look = {"color": matplotlib.colormaps["tab10"](number), "label": name}
            axes.plot(trace.steps, trace.kept.sum(axis=1), linewidth=1.4, **look)
        axes.axhline(mean, color="0.2", linestyle="--", linewidth=1, label=f"mean of all looks: {mean:.1f}")
        axes.set_ylabel(f"tokens kept of {traces[0].kept.shape[1]}")
        axes.set_ylim(bottom=0)
        figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside lower center")
        _style_axes([axes])
    return figure


def _style_axes(panels: Sequence[Any]) -> None:
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("control step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
