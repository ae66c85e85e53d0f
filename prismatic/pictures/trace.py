"""An episode as the policy saw it: what it kept of every picture."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prismatic.pictures.frame import PANEL_SIZE, Caption, compose_frame, labelled_sheet
from prismatic.pictures.images import Picture, resize
from prismatic.pictures.overlay import dim_pruned, kept_grids, outline_kept


@dataclass(frozen=True)
class PruningTrace:
    """What a policy saw over the L policy queries of one episode, with I cameras.

    Args:
        title: Stands above the frames: the instruction, say.
        cameras: Their names, in the policy's order.
        images: Per camera what the policy was given, uint8 (L, H, W, 3).
        kept: (L, V) bool, the visual tokens that stayed.
        steps: (L,) how many control steps had been taken at each policy query.
        center_crop: Whether the policy saw the central part only.
        control_rate_hz: Control steps per second.
        scores: (L, V) the best score that any patch query gave each token, where there are scores.
        success: How the episode ended, where that is known.
        source: Where the pictures come from and which policy kept what, for titles; episodes of one title and source
            share maps.
        start: Where the episode began, as text.
        unit: Of `steps`: `step`, or `query` where nobody knows how many control steps were taken, and
            `control_rate_hz` then counts policy queries.

    Raises:
        ValueError: when the numbers of policy queries or cameras differ, or V is not I squares.
    """

    title: str
    cameras: tuple[str, ...]
    images: tuple[NDArray[np.uint8], ...]
    kept: NDArray[np.bool_]
    steps: NDArray[np.int64]
    center_crop: bool = False
    control_rate_hz: float = 20.0
    scores: NDArray[np.float32] | None = None
    success: bool | None = None
    source: str = ""
    start: str = ""
    unit: str = "step"

    def __post_init__(self) -> None:
        queries = {len(part) for part in (*self.images, self.kept, self.steps, *self._scores)}
        if len(queries) != 1 or queries == {0} or len(self.images) != len(self.cameras):
            raise ValueError(
                f"{self.title!r}: {len(self.cameras)} cameras, {len(self.images)} rows of pictures, numbers of policy "
                f"queries {sorted(queries)}; expected a row per camera, and a picture, a mask and a step per query"
            )
        kept_grids(self.kept[0], len(self.images))

    @property
    def _scores(self) -> tuple[NDArray[np.float32], ...]:
        return () if self.scores is None else (self.scores,)

    @property
    def num_queries(self) -> int:
        """L."""
        return len(self.steps)

    @property
    def unit_name(self) -> str:
        """For axes: `control step` or `policy query`."""
        return {"step": "control step", "query": "policy query"}[self.unit]

    @property
    def queries_per_second(self) -> float:
        """How often the policy was queried, for playing the queries in real time; 1 for a single query."""
        return self.control_rate_hz / float(np.median(np.diff(self.steps))) if self.num_queries > 1 else 1.0

    @property
    def grids(self) -> NDArray[np.bool_]:
        """(L, I, G, G) bool, the kept patches of every camera."""
        return np.stack([kept_grids(row, len(self.images)) for row in self.kept])

    def seen(self, query: int, size: int = PANEL_SIZE) -> list[Picture]:
        """One policy query's pictures (size, size, 3) with pruned patches dimmed and kept ones outlined."""
        drawn = []
        for pictures, grid in zip(self.images, kept_grids(self.kept[query], len(self.images)), strict=True):
            dimmed = dim_pruned(resize(pictures[query], size), grid, self.center_crop)
            drawn.append(outline_kept(dimmed, grid, self.center_crop))
        return drawn

    def frame(self, query: int) -> Picture:
        """One policy query as a captioned frame: the pictures, and beside them the same with pruned patches dimmed."""
        row = self.kept[query]
        detail = f"{self.unit} {self.steps[query]} · kept {row.sum()} of {row.size} visual tokens"
        if len(self.cameras) > 1:
            counts = kept_grids(row, len(self.cameras)).sum(axis=(1, 2))
            detail += f" ({' + '.join(map(str, counts))})"
        last = query in (self.num_queries - 1, -1)
        caption = Caption(self.title, detail, self.success if last else None, self.context)
        return compose_frame([pictures[query] for pictures in self.images], self.seen(query), caption)

    @property
    def context(self) -> str:
        """Start and source."""
        return " · ".join(filter(None, (self.start, self.source)))

    def overview(self, columns: int = 6, size: int = 176) -> Picture:
        """What was kept at a few policy queries from first to last, a row per camera."""
        chosen = np.linspace(0, self.num_queries - 1, min(columns, self.num_queries)).round().astype(int)
        rows = list(zip(*(self.seen(query, size) for query in chosen), strict=True))
        title = " · ".join(filter(None, (self.title, self.context, "dark is pruned")))
        return labelled_sheet(rows, title, [f"{self.unit} {self.steps[query]}" for query in chosen], self.cameras, size)
