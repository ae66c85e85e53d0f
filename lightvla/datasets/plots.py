"""What an inspected dataset looks like: how long its episodes are, what was done in one, what a camera saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from prismatic.pictures.images import resize
from prismatic.report.data import Table, counted
from prismatic.report.figures import COLOURS, INK, STYLE, chart_axes, spread, style_spines, to_svg
from prismatic.vla.datasets.stored.episode import Episode, UnreadableImage
from prismatic.vla.images import encode_jpeg

_BINS = 30
_SIDE = 144  # pixels of a picture in a strip
_IN_A_ROW = 5
_GREY = 128


@dataclass(frozen=True, eq=False)
class Lengths:
    """How many episodes have how many frames.

    Args:
        lengths: (E,) frames of each episode.
        chunk: Frames below which an episode holds no sample.
    """

    kind: ClassVar[str] = "chart"
    wide: ClassVar[bool] = True
    title: str
    lengths: NDArray[np.int64]
    chunk: int

    @property
    def description(self) -> str:
        least, middle, most = self.lengths.min(), np.median(self.lengths), self.lengths.max()
        return f"{self.title}: {counted(len(self.lengths), 'episode')} of {least} to {most} frames, median {middle:g}"

    def table(self) -> Table | None:
        rows = [
            (name, f"{np.quantile(self.lengths, share):g}")
            for name, share in (("shortest", 0), ("1 % have fewer", 0.01), ("median", 0.5), ("longest", 1))
        ]
        return Table("Lengths", ("", "frames"), rows)

    def svg(self) -> str | None:
        with chart_axes(5.2, 2.6) as axes:
            bins = min(_BINS, int(np.ptp(self.lengths)) + 1)
            axes.hist(self.lengths, bins=bins, color=COLOURS[0], alpha=0.7)
            axes.axvline(self.chunk, color=COLOURS[1], linewidth=1.4, linestyle="--")
            axes.set_xlim(left=0)
            axes.set_xlabel(f"frames (dashed: a chunk of {self.chunk} actions)", color=INK)
            axes.set_ylabel("episodes", color=INK)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            return to_svg(axes, self.description)


@dataclass(frozen=True, eq=False)
class ActionPlot:
    """The actions of one episode, a panel per dimension.

    Args:
        actions: (T, A).
        names: Of the dimensions.
        low, high: (A,) 1 % and 99 % quantiles of the dataset.
    """

    kind: ClassVar[str] = "chart"
    wide: ClassVar[bool] = False
    title: str
    actions: NDArray[np.float64]
    names: tuple[str, ...]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def description(self) -> str:
        ends = [
            f"{name} {np.nanmin(values, initial=np.inf):.3g} to {np.nanmax(values, initial=-np.inf):.3g}"
            for name, values in zip(self.names, self.actions.T, strict=True)
        ]
        return f"{self.title}, {counted(len(self.actions), 'frame')}: {'; '.join(ends)}"

    def table(self) -> Table | None:
        rows = [(str(step), *(f"{value:.3g}" for value in self.actions[step])) for step in spread(len(self.actions), 6)]
        return Table(self.title, ("step", *self.names), rows)

    def svg(self) -> str | None:
        if not len(self.actions):
            return None
        count = len(self.names)
        with matplotlib.rc_context(STYLE):
            height = 0.5 + 0.66 * count
            figure = Figure(figsize=(4.6, height))
            edges = {"left": 0.22, "right": 0.98, "bottom": 0.45 / height, "top": 1 - 0.08 / height, "hspace": 0.35}
            panels = figure.subplots(count, 1, sharex=True, squeeze=False, gridspec_kw=edges)[:, 0]
            for number, axes in enumerate(panels):
                self._panel(axes, number)
            panels[-1].set_xlabel("step", color=INK)
            panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            return to_svg(panels[0], self.description)

    def _panel(self, axes: Any, number: int) -> None:
        for bound in (self.low[number], self.high[number]):
            axes.axhline(bound, color=INK, alpha=0.25, linewidth=0.8)
        axes.plot(self.actions[:, number], color=COLOURS[number % len(COLOURS)], linewidth=1.4)
        axes.tick_params(colors=INK, which="both", length=3, labelsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.set_ylabel(self.names[number], color=INK, fontsize=9, rotation=0, ha="right", va="center")
        axes.yaxis.set_label_coords(-0.13, 0.5)
        style_spines(axes)


def camera_strip(episode: Episode, cameras: list[str], marked: int | None = None) -> bytes:
    """JPEG: a row per camera of pictures from the first to the last, of which one shows the marked step.

    A picture that cannot be decoded is grey.
    """
    steps = spread(episode.num_frames, _IN_A_ROW)
    if marked is not None and marked not in steps:
        steps[int(np.argmin(np.abs(np.array(steps) - marked)))] = marked
    rows = [
        np.concatenate([np.pad(_seen(episode, camera, step), ((2, 2), (2, 2), (0, 0))) for step in steps], axis=1)
        for camera in cameras
    ]
    return encode_jpeg(np.concatenate(rows))


def _seen(episode: Episode, camera: str, step: int) -> NDArray[np.uint8]:
    try:
        return resize(episode.image(camera, step), _SIDE)
    except UnreadableImage:
        return np.full((_SIDE, _SIDE, 3), _GREY, np.uint8)
