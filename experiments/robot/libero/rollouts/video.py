"""A rollout as a video and as a sheet of pictures: camera views beside what the policy kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.policies.contract import ActionChunk, Observation
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.rollout import Moment
from experiments.robot.libero.rollouts.start import start_text
from experiments.robot.libero.simulator.environment import CAMERAS
from prismatic.pictures.frame import Caption, compose_frame, labelled_sheet
from prismatic.pictures.images import Picture, encode_png
from prismatic.pictures.overlay import dim_pruned, kept_grids
from prismatic.pictures.video import write_mp4

_SHEET_QUERIES, _SHEET_SIZE = 6, 176


_HOLD_SECONDS = 1.0  # The last frame of a video stays that long, for reading the outcome.


@dataclass(frozen=True)
class _Shot:
    """One frame of a video before its text is known: a step, its views and the number of the last query, if any."""

    step: int
    views: list[Picture]
    query: int | None


@dataclass
class RolloutRecorder:
    """Gathers the frames of a video: live camera views, below them the last policy query with pruned patches dimmed.

    Args:
        title: Stands above the frames.
        every_steps: A frame each so many control steps (those of the policy's queries cost no extra rendering).
        center_crop: Whether the policy sees the central part only.
        control_rate_hz: Control steps per second, so that the video plays in real time.
        queries: Per policy query, what the policy was shown, with pruned patches dimmed.
    """

    title: str
    every_steps: int = 2
    center_crop: bool = True
    control_rate_hz: float = 20.0
    queries: list[list[Picture]] = field(default_factory=list)
    _steps: list[int] = field(default_factory=list)
    _counts: list[str] = field(default_factory=list)
    _cameras: list[str] = field(default_factory=list)
    _shots: list[_Shot] = field(default_factory=list)
    _record: EpisodeRecord | None = None

    def on_query(self, moment: Moment, observation: Observation, chunk: ActionChunk) -> None:
        """A frame, from now on with what the policy was shown and pruned patches dimmed."""
        if chunk.kept is not None:
            self._cameras = [key for key in observation if key in CAMERAS]
            given = [observation[key] for key in self._cameras]
            grids = kept_grids(chunk.kept, len(given))
            dimmed = [dim_pruned(image, grid, self.center_crop) for image, grid in zip(given, grids, strict=True)]
            self.queries.append(dimmed)
            self._steps.append(moment.step)
            self._counts.append(f" · kept {int(chunk.kept.sum())} of {chunk.kept.size} visual tokens")
        self._shoot(moment)

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        """A frame, where one is due."""
        if moment.step % self.every_steps == 0:
            self._shoot(moment)

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        """A last frame; now there can be a video, whose frames name initial state and control."""
        self._shoot(moment)
        self._record = record

    def _shoot(self, moment: Moment) -> None:
        """Keep the moment's views, in place of an earlier shot of the same moment."""
        if self._shots and self._shots[-1].step == moment.step:
            self._shots.pop()
        self._shots.append(_Shot(moment.step, moment.views, len(self.queries) - 1 if self.queries else None))

    @property
    def fps(self) -> float:
        return self.control_rate_hz / self.every_steps

    def frames(self) -> Iterator[Picture]:
        """The frames of the ended rollout, one by one; the last one says how it ended and stays for a moment."""
        record = self._ended()
        for shot in self._shots:
            seen, count = ([], "") if shot.query is None else (self.queries[shot.query], self._counts[shot.query])
            success, outcome = None, ""
            if shot is self._shots[-1]:
                success, outcome = _outcome(record)
            caption = Caption(self.title, f"step {shot.step}{count}", success, start_text(record), outcome)
            yield (frame := compose_frame(shot.views, seen, caption))
        yield from [frame] * round(_HOLD_SECONDS * self.fps)

    def _ended(self) -> EpisodeRecord:
        if self._record is None:
            raise RuntimeError("the rollout has not ended; there is no video of it")
        return self._record

    def save(self, path: Path) -> None:
        """Write the video, and beside it (`.png`) what was kept at a few queries, first to last, a row per camera."""
        write_mp4(path, self.frames(), self.fps)
        if self.queries:
            chosen = np.linspace(0, len(self.queries) - 1, min(_SHEET_QUERIES, len(self.queries))).round().astype(int)
            rows = list(zip(*(self.queries[index] for index in chosen), strict=True))
            steps = [f"step {self._steps[index]}" for index in chosen]
            record = self._ended()
            title = f"{self.title} · {start_text(record)} · {_outcome(record)[1]} · dark is pruned"
            picture = labelled_sheet(rows, title, steps, self._cameras, _SHEET_SIZE)
            path.with_suffix(".png").write_bytes(encode_png(picture))


def _outcome(record: EpisodeRecord) -> tuple[bool | None, str]:
    """Whether what the instruction asks was done, and the text for it."""
    if record.other_task is not None:
        return record.other_success, f"instructed goal {'reached' if record.other_success else 'not reached'}"
    return record.success, "solved" if record.success else "not solved"
