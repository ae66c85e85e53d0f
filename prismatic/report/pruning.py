"""Figures of what a pruner keeps: heat maps over the cameras' mean pictures, and charts over an episode."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from prismatic.pictures.frame import PANEL_SIZE
from prismatic.pictures.images import resize
from prismatic.pictures.trace import PruningTrace
from prismatic.report.figures import COLOURS, STYLE
from prismatic.vla.crop import CROP_AREA

COLOUR_MAP = "inferno"
MAX_NAMED = 8
DPI = 150

_TITLE_LETTERS = 88


@dataclass(frozen=True)
class PatchSums:
    """What was kept of every patch, summed over policy queries: maps of many episodes need not hold their pictures.

    Args:
        cameras: I names.
        center_crop: Whether the policy saw the central part of the pictures only.
        queries: How many were summed.
        kept: (I, G, G) in how many policy queries each patch was kept.
        pictures: (I, size, size) sums of the pictures' grey levels in [0, 1].
        scores: (I, G, G) sums of the best score that any patch query gave each; None where a policy query had none.
    """

    cameras: tuple[str, ...]
    center_crop: bool
    queries: int
    kept: NDArray[np.int64]
    pictures: NDArray[np.float64]
    scores: NDArray[np.float64] | None

    @classmethod
    def of(cls, trace: PruningTrace, size: int = PANEL_SIZE) -> PatchSums:
        """Those of one episode."""
        grids = trace.grids
        pictures = [sum(resize(picture, size).mean(axis=2) for picture in row) for row in trace.images]
        scores = None
        if trace.scores is not None:
            scores = trace.scores.astype(np.float64).sum(axis=0).reshape(grids.shape[1:])
        kept = grids.sum(axis=0, dtype=np.int64)
        return cls(trace.cameras, trace.center_crop, trace.num_queries, kept, np.stack(pictures) / 255, scores)

    def __add__(self, other: PatchSums) -> PatchSums:
        """Over the queries of both. Raises ValueError for other cameras, grids or crops, which no map can share."""
        if (self.cameras, self.kept.shape, self.center_crop) != (other.cameras, other.kept.shape, other.center_crop):
            raise ValueError(
                "one map needs episodes of equal cameras, grids of patches and crops; got "
                f"{self._layout}; {other._layout}. Draw them one by one"
            )
        scores = None if self.scores is None or other.scores is None else self.scores + other.scores
        queries, kept, pictures = self.queries + other.queries, self.kept + other.kept, self.pictures + other.pictures
        return PatchSums(self.cameras, self.center_crop, queries, kept, pictures, scores)

    @property
    def _layout(self) -> str:
        return f"{', '.join(self.cameras)}: {self.kept.shape[1:]}, {'cropped' if self.center_crop else 'whole'}"

    @property
    def keep_shares(self) -> NDArray[np.float64]:
        """(I, G, G): the share of all policy queries in which each patch was kept, each counting once."""
        return self.kept / self.queries

    @property
    def mean_scores(self) -> NDArray[np.float64]:
        """(I, G, G): the best score that any patch query gave each patch, averaged over all policy queries.

        Raises:
            ValueError: where a policy query had none.
        """
        if self.scores is None:
            raise ValueError(
                "no scores: pruners other than LightVLA's and LightVLA*'s, text_similarity, fastv give none"
            )
        return self.scores / self.queries

    @property
    def mean_pictures(self) -> NDArray[np.float64]:
        """(I, size, size) grey levels in [0, 1]: each camera's pictures, averaged over all policy queries."""
        return self.pictures / self.queries


def keep_map(sums: PatchSums, title: str) -> Figure:
    """How often each patch was kept: a row per camera, its mean picture and the map beside it."""
    shares = sums.keep_shares
    headings = [f"{share.sum():.1f} of {share.size} patches per policy query" for share in shares]
    scale = Normalize(0.0, max(float(shares.max()), 1e-6))
    figure, panels = _patch_map(sums, title, shares, [scale] * len(shares), headings)
    bar = figure.colorbar(ScalarMappable(scale, COLOUR_MAP), ax=panels, fraction=0.04, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.set_label("share of policy queries in which the patch was kept")
    return figure


def score_map(sums: PatchSums, title: str) -> Figure:
    """The best score that any patch query gave each patch, on average; every camera has its own scale.

    Raises:
        ValueError: as `PatchSums.mean_scores`.
    """
    scores = sums.mean_scores
    scales = [Normalize(float(score.min()), float(score.max())) for score in scores]
    figure, panels = _patch_map(sums, title, scores, scales, ["best score of any patch query"] * len(scores))
    for row, scale in zip(panels, scales, strict=True):
        figure.colorbar(ScalarMappable(scale, COLOUR_MAP), ax=row, fraction=0.04, pad=0.02)
    return figure


def _patch_map(
    sums: PatchSums,
    title: str,
    values: NDArray[np.float64],
    scales: Sequence[Normalize],
    headings: Sequence[str],
) -> tuple[Figure, NDArray[Any]]:
    """Values (I, G, G) in colour beside the mean pictures, with the same patches; the figure and its panels (I, 2).

    Colours are the colour bar's own: laid over a picture they would be other ones.
    """
    # The grid covers what the policy saw, which is the central part where it crops.
    margin = (1 - math.sqrt(CROP_AREA)) / 2 if sums.center_crop else 0.0
    seen = (margin, 1 - margin, 1 - margin, margin)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.7 + 4.0 * len(values)), layout="constrained")
        figure.suptitle("\n".join(textwrap.fill(line, _TITLE_LETTERS) for line in title.splitlines()), fontsize=11)
        panels = figure.subplots(len(values), 2, squeeze=False)
        for number, (picture, (left, right)) in enumerate(zip(sums.mean_pictures, panels, strict=True)):
            left.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
            right.imshow(values[number], cmap=COLOUR_MAP, norm=scales[number], extent=seen, interpolation="nearest")
            left.set_title(f"{sums.cameras[number]}: mean picture", fontsize=10)
            right.set_title(f"{sums.cameras[number]}: {headings[number]}", fontsize=10)
            borders = np.linspace(margin, 1 - margin, len(values[number]) + 1)
            for axes in (left, right):
                axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
                axes.hlines(borders, margin, 1 - margin, color="white", linewidth=0.4, alpha=0.5)
                axes.vlines(borders, margin, 1 - margin, color="white", linewidth=0.4, alpha=0.5)
    return figure, panels


def kept_chart(trace: PruningTrace) -> Figure:
    """Tokens kept at each policy query of an episode, in all and per camera.

    Below, where there are scores, what sets kept tokens apart: the median and the middle 80 % of the best scores of
    kept and of pruned tokens.
    """
    counts = trace.grids.sum(axis=(2, 3))
    lines = {"all cameras": counts.sum(axis=1)}
    if len(trace.cameras) > 1:
        lines |= dict(zip(trace.cameras, counts.T, strict=True))
    rows = 1 if trace.scores is None else 2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.0 + 2.4 * rows), layout="constrained")
        figure.suptitle(trace.title, fontsize=11)
        panels = list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])
        drawn = []
        for number, values in enumerate(lines.values()):
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 3}
            drawn += panels[0].plot(trace.steps, values, linewidth=1.8, **style)
        panels[0].set_ylabel(f"tokens kept of {trace.kept.shape[1]}")
        panels[0].set_ylim(0, 1.25 * max(values.max() for values in lines.values()))
        panels[0].legend(drawn, list(lines), frameon=False, fontsize=9, ncols=len(lines), loc="upper left")
        if trace.scores is not None:
            _draw_scores(panels[1], trace.steps, trace.scores, trace.kept)
        _style_axes(panels, trace.unit_name)
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
    axes.set_ylabel("best score of any patch query")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")


KeptTokens = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(L,) control steps taken at each policy query of an episode, and (L,) tokens kept there."""


def compare_chart(episodes: Mapping[str, KeptTokens], num_tokens: int, unit: str = "control step") -> Figure:
    """Tokens kept of `num_tokens` at each policy query, a line per episode, and their mean; few episodes are named."""
    few = len(episodes) <= MAX_NAMED
    mean = float(np.concatenate([kept for _, kept in episodes.values()]).mean())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.4 + (0.12 * len(episodes) if few else 0.0)), layout="constrained")
        figure.suptitle(f"{len(episodes)} episodes", fontsize=11)
        axes = figure.subplots()
        entries: dict[str, Any] = {}
        for number, (name, (steps, kept)) in enumerate(episodes.items()):
            style: dict[str, Any] = {"color": "0.5", "alpha": 0.35}
            if few:
                style = {"color": matplotlib.colormaps["tab10"](number)}
            (line,) = axes.plot(steps, kept, linewidth=1.4, **style)
            entries |= {name: line} if few else {}
        entries[f"mean of all queries: {mean:.1f}"] = axes.axhline(mean, color="0.2", linestyle="--", linewidth=1)
        axes.set_ylabel(f"tokens kept of {num_tokens}")
        axes.set_ylim(bottom=0)
        # Labels are given: those that matplotlib gathers by itself lack all that begin with `_`.
        style = {"frameon": False, "fontsize": 9, "ncols": 2}
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", **style)
        _style_axes([axes], unit)
    return figure


def _style_axes(panels: Sequence[Any], unit: str) -> None:
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(unit)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
