"""Looks at what a policy's tokens lie on while it acts, and blanks those that a question is about."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.looks.classes import CLASSES, TARGET, aims_of, classes_of_bodies
from experiments.robot.libero.looks.phases import Carried, Phases
from experiments.robot.libero.looks.seen import FOLDER, Seen
from experiments.robot.libero.looks.shares import count_pixels, lies_on
from experiments.robot.libero.policies.contract import ActionChunk, Observation, PolicyQuery
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.rollout import Moment
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.simulator.scene import Scene
from prismatic.vla.request import Blanking


@dataclass(frozen=True)
class Looking:
    """How every rollout of a condition is looked at; makes its probes.

    Attributes:
        cameras: observation keys, in the tokens' order.
        grid: patches along a side of a picture.
        center_crop: whether the policy sees the central part of the pictures only.
        blank: class whose kept tokens lose their content, or another of `config.BLANKED`; None: none.
        pictured: pictures are kept of the first so many trials of a task.
    """

    cameras: tuple[str, ...]
    grid: int
    center_crop: bool
    blank: str | None = None
    pictured: int = 0

    def probe(self, start: Start) -> LooksProbe:
        return LooksProbe(self, start.trial < self.pictured)


@dataclass
class LooksProbe:
    """Of one rollout; a `Probe`."""

    looking: Looking
    is_pictured: bool = False
    _phases: Phases | None = None
    _of_body: NDArray[np.uint8] | None = None
    _names: list[tuple[str, str]] = field(default_factory=list)
    _carried: list[Carried | None] = field(default_factory=list)
    _steps: list[int] = field(default_factory=list)
    _found_phases: list[int] = field(default_factory=list)
    _pixels: list[NDArray[np.int64]] = field(default_factory=list)
    _kept: list[NDArray[np.bool_]] = field(default_factory=list)
    _blanked: list[NDArray[np.bool_]] = field(default_factory=list)
    _images: list[list[NDArray[np.uint8]]] = field(default_factory=list)
    _classes: list[list[NDArray[np.uint8]]] = field(default_factory=list)

    def before_query(self, moment: Moment, query: PolicyQuery) -> PolicyQuery:
        """Look at the moment; the query says which tokens are to be blanked."""
        environment, looking = moment.environment, self.looking
        if self._of_body is None or self._phases is None:
            self._of_body, self._phases = classes_of_bodies(environment), Phases(environment)
            aims = aims_of(Scene(environment.inner), environment.task.goal)
            self._names = [(aim.target_name, aim.goal_name) for aim in aims]
        maps = [self._of_body[environment.bodies(camera)] for camera in looking.cameras]
        pixels = np.concatenate([count_pixels(each, looking.grid, looking.center_crop) for each in maps])
        self._steps.append(moment.step)
        self._found_phases.append(self._phases.now(moment.step))
        self._pixels.append(pixels)
        if self.is_pictured:
            self._classes.append(maps)
        if looking.blank is None:
            return query
        if looking.blank == "hidden":
            target = np.flatnonzero(self._of_body[:-1] == TARGET).tolist()
            pictures = {camera: environment.frame(camera, target) for camera in looking.cameras}
            return replace(query, observation={**query.observation, **pictures})
        return replace(query, blanking=_blanking(looking.blank, pixels, query.seed))

    def on_query(self, moment: Moment, observation: Observation, chunk: ActionChunk) -> None:
        """Note what the policy kept. Raises ValueError where it does not say, or has not blanked what was asked."""
        num_visual = len(self._pixels[-1])
        if chunk.kept is None or len(chunk.kept) != num_visual:
            raise ValueError(f"the policy does not say which of its {num_visual} visual tokens it kept")
        if chunk.blanked is None and self.looking.blank not in (None, "hidden"):
            raise ValueError("the policy has blanked no tokens, although it was asked to")
        self._kept.append(chunk.kept)
        self._blanked.append(np.zeros(num_visual, bool) if chunk.blanked is None else chunk.blanked)
        if self.is_pictured:
            self._images.append([observation[camera] for camera in self.looking.cameras])

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        """Follow the phases."""
        assert self._phases is not None
        self._phases.step(moment, action)

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        """Note where the episode put what it carried."""
        if self._phases is not None:
            self._carried = self._phases.carried()

    def save(self, record: EpisodeRecord, folder: Path, stem: str) -> None:
        """Write the rollout's file."""
        seen = Seen(
            cameras=self.looking.cameras,
            names=self._names,
            carried=self._carried,
            steps=np.array(self._steps),
            phases=np.array(self._found_phases),
            kept=np.stack(self._kept),
            blanked=np.stack(self._blanked),
            pixels=np.stack(self._pixels),
            images=[np.stack(each) for each in zip(*self._images, strict=True)],
            classes=[np.stack(each) for each in zip(*self._classes, strict=True)],
            actions_sha256=record.actions_sha256,
        )
        seen.save(folder / FOLDER / f"{stem}.npz")


def _blanking(blank: str, pixels: NDArray[np.int64], seed: int) -> Blanking:
    """Which of the V tokens, (V, classes) pixels of whose patches these are, lose their content."""
    if blank == "all":
        return Blanking(np.ones(len(pixels), bool))
    if blank == "random":
        return Blanking(lies_on(pixels, TARGET), seed)
    return Blanking(lies_on(pixels, CLASSES.index(blank)))
