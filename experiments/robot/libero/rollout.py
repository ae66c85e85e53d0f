"""One rollout: look, act open loop, look again, until the goal holds or the steps are used up."""

from __future__ import annotations

import functools
import hashlib
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.agents import Answer, Answerer, Observation, Request, look_seed
from experiments.robot.libero.environment import CAMERAS, LiberoEnvironment, LiberoTask
from experiments.robot.libero.results import EpisodeRecord
from prismatic.visualization import (
    Caption,
    Picture,
    compose_frame,
    dim_pruned,
    encode_png,
    kept_grids,
    labelled_sheet,
    write_mp4,
)

if TYPE_CHECKING:
    from experiments.robot.libero.starts import Displacement

BLANK_LEVEL = 127
"""Grey level of every pixel under the control `blank_images`."""

_SHEET_LOOKS, _SHEET_SIZE = 6, 176
_HOLD_SECONDS = 1.0  # The last frame of a video stays that long, for reading the outcome.


@dataclass(frozen=True)
class Start:
    """Where a rollout begins and what the policy is told.

    Args:
        instruction: The words; under the control `swapped_instruction` those of `other`.
        initial_state: Index into the task's initial states.
        trial: Counts the rollouts of one task.
        seed: Of the simulator's reset.
        displacement: Moves objects away from their standard places.
        state: Takes the place of the task's own initial state (S,).
        other: The task whose words are given instead, so that its goal is watched too.
    """

    task: LiberoTask
    instruction: str
    initial_state: int
    trial: int
    seed: int
    displacement: Displacement | None = None
    state: NDArray[np.float64] | None = None
    other: LiberoTask | None = None

    @property
    def key(self) -> tuple[str, int, int, int]:
        """As `EpisodeRecord.key`."""
        return self.task.suite, self.task.index, self.initial_state, self.trial


@dataclass(frozen=True)
class RolloutSettings:
    """How every rollout of an evaluation runs.

    Args:
        max_steps: Control steps after which a rollout has failed.
        open_loop_steps: Actions executed of each chunk, the first ones.
        control: Name of the control, for the record.
        blank_images: Show the policy mid-grey pictures and render nothing for it.
        cameras: Observation keys of the pictures that the policy reads, in order.
        render_every_step: Draw all cameras at every step and throw most pictures away, as the research code does; for
            measuring what that costs.
    """

    max_steps: int
    open_loop_steps: int = 8
    control: str = "none"
    blank_images: bool = False
    cameras: tuple[str, ...] = tuple(CAMERAS)
    render_every_step: bool = False


class Moment:
    """The simulation as it stands after `step` control steps; valid until the next one."""

    def __init__(self, environment: LiberoEnvironment, cameras: Sequence[str], step: int) -> None:
        self.environment, self.step = environment, step
        self._cameras = tuple(cameras)

    @functools.cached_property
    def views(self) -> list[Picture]:
        """The pictures of the policy's cameras, uint8 (H, W, 3) each, drawn when first asked for."""
        return [self.environment.frame(camera) for camera in self._cameras]


class Observer(Protocol):
    """Watches a rollout without changing it."""

    def look(self, moment: Moment, observation: Observation, answer: Answer) -> None:
        """The policy was given `observation` and answered."""
        ...

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        """An action (7,), as the policy returned it, has led to `moment`."""
        ...

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        """The rollout has ended as the record says; not called for an invalid one."""
        ...


@dataclass(frozen=True)
class _Shot:
    """One frame of a video before its words are known: a step, its views and the look before it, if that was told."""

    step: int
    views: list[Picture]
    look: int | None


@dataclass
class RolloutRecorder:
    """Gathers the frames of a video: live camera views, below them the policy's last look with pruned patches dimmed.

    Args:
        title: Stands above the frames.
        every_steps: A frame each so many control steps (those of the policy's looks cost no extra rendering).
        center_crop: Whether the policy sees the central part only.
        control_rate_hz: Control steps per second, so that the video plays in real time.
        looks: Per look, what the policy was shown, with pruned patches dimmed.
    """

    title: str
    every_steps: int = 2
    center_crop: bool = True
    control_rate_hz: float = 20.0
    looks: list[list[Picture]] = field(default_factory=list)
    _steps: list[int] = field(default_factory=list)
    _counts: list[str] = field(default_factory=list)
    _cameras: list[str] = field(default_factory=list)
    _shots: list[_Shot] = field(default_factory=list)
    _record: EpisodeRecord | None = None

    def look(self, moment: Moment, observation: Observation, answer: Answer) -> None:
        """A frame, from now on with what the policy was shown and pruned patches dimmed."""
        if answer.kept is not None:
            self._cameras = [key for key in observation if key in CAMERAS]
            given = [observation[key] for key in self._cameras]
            grids = kept_grids(answer.kept, len(given))
            dimmed = [dim_pruned(image, grid, self.center_crop) for image, grid in zip(given, grids, strict=True)]
            self.looks.append(dimmed)
            self._steps.append(moment.step)
            self._counts.append(f" · kept {int(answer.kept.sum())} of {answer.kept.size} visual tokens")
        self._shoot(moment)

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        """A frame, where one is due."""
        if moment.step % self.every_steps == 0:
            self._shoot(moment)

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        """A last frame; now there can be a video, whose frames name start and control."""
        self._shoot(moment)
        self._record = record

    def _shoot(self, moment: Moment) -> None:
        """Keep the moment's views, in place of an earlier shot of the same moment."""
        if self._shots and self._shots[-1].step == moment.step:
            self._shots.pop()
        self._shots.append(_Shot(moment.step, moment.views, len(self.looks) - 1 if self.looks else None))

    @property
    def fps(self) -> float:
        return self.control_rate_hz / self.every_steps

    def frames(self) -> Iterator[Picture]:
        """The frames of the ended rollout, one by one; the last one says how it ended and stays for a moment."""
        record = self._ended()
        for shot in self._shots:
            seen, count = ([], "") if shot.look is None else (self.looks[shot.look], self._counts[shot.look])
            success, words = None, ""
            if shot is self._shots[-1]:
                success, words = _outcome(record)
            caption = Caption(self.title, f"step {shot.step}{count}", success, start_words(record), words)
            yield (frame := compose_frame(shot.views, seen, caption))
        yield from [frame] * round(_HOLD_SECONDS * self.fps)

    def _ended(self) -> EpisodeRecord:
        if self._record is None:
            raise RuntimeError("the rollout has not ended; there is no video of it")
        return self._record

    def save(self, path: Path) -> None:
        """Write the video, and beside it (`.png`) what was kept at a few looks from first to last, a row per camera."""
        partial = path.with_name(f"partial-{path.name}")
        write_mp4(partial, self.frames(), self.fps)
        os.replace(partial, path)
        if self.looks:
            chosen = np.linspace(0, len(self.looks) - 1, min(_SHEET_LOOKS, len(self.looks))).round().astype(int)
            rows = list(zip(*(self.looks[index] for index in chosen), strict=True))
            steps = [f"step {self._steps[index]}" for index in chosen]
            record = self._ended()
            title = f"{self.title} · {start_words(record)} · {_outcome(record)[1]} · dark is pruned"
            picture = labelled_sheet(rows, title, steps, self._cameras, _SHEET_SIZE)
            path.with_suffix(".png").write_bytes(encode_png(picture))


def _outcome(record: EpisodeRecord) -> tuple[bool | None, str]:
    """Whether what was told was done, and the words for it."""
    if record.other_task is not None:
        return record.other_success, f"told goal {'reached' if record.other_success else 'not reached'}"
    return record.success, "solved" if record.success else "not solved"


def start_words(record: EpisodeRecord) -> str:
    """`initial state 30, trial 0 · control: blank images`; where another task's words were given also the own task."""
    words = f"initial state {record.initial_state}, trial {record.trial}"
    if record.control != "none":
        words += f" · control: {record.control.replace('_', ' ')}"
    if record.other_task is not None:
        words += f", own task: {record.task_name.replace('_', ' ')}"
    return words


def new_record(start: Start, control: str = "none") -> EpisodeRecord:
    """The record of a rollout that has not begun."""
    return EpisodeRecord(
        suite=start.task.suite,
        task_index=start.task.index,
        task_name=start.task.name,
        instruction=start.instruction,
        initial_state=start.initial_state,
        trial=start.trial,
        seed=start.seed,
        control=control,
        displacement=None if start.displacement is None else asdict(start.displacement),
        other_task=None if start.other is None else start.other.index,
        bddl_sha256=start.task.bddl_sha256,
        init_states_sha256=start.task.init_states_sha256,
    )


def run_episode(
    environment: LiberoEnvironment,
    agent: Answerer,
    start: Start,
    settings: RolloutSettings,
    observers: Sequence[Observer] = (),
) -> EpisodeRecord:
    """Roll out once. An exception on the way makes the rollout invalid, with the traceback in the record.

    With `start.other` the rollout ends as soon as either goal holds.
    """
    record = new_record(start, settings.control)
    began = time.perf_counter()
    try:
        state = start.initial_state if start.state is None else start.state
        environment.reset(state, seed=start.seed, displacement=start.displacement)
        _act_until_done(environment, agent, start, settings, record, observers)
    except Exception:
        record.success = record.other_success = None
        record.invalid = traceback.format_exc()
    record.wall_seconds = round(time.perf_counter() - began, 3)
    return record


def _act_until_done(
    environment: LiberoEnvironment,
    agent: Answerer,
    start: Start,
    settings: RolloutSettings,
    record: EpisodeRecord,
    observers: Sequence[Observer],
) -> None:
    """Fill in everything in the record that depends on acting."""
    own = other = False
    digest = hashlib.sha256()
    moment = Moment(environment, settings.cameras, 0)
    while record.steps < settings.max_steps and not (own or other):
        chunk = _look(moment, agent, start, settings, record, observers)
        for action in chunk:
            digest.update(action.tobytes())
            own = environment.step_policy(action)
            other = start.other is not None and environment.succeeded(start.other.goal)
            record.steps += 1
            moment = Moment(environment, settings.cameras, record.steps)
            for observer in observers:
                observer.step(moment, action)
            if own or other or record.steps >= settings.max_steps:
                break
            if settings.render_every_step:
                _ = moment.views
    record.success = own
    record.actions_sha256 = digest.hexdigest()
    record.other_success = None if start.other is None else other
    for observer in observers:
        observer.finish(moment, record)


def _look(
    moment: Moment,
    agent: Answerer,
    start: Start,
    settings: RolloutSettings,
    record: EpisodeRecord,
    observers: Sequence[Observer],
) -> list[NDArray[np.float64]]:
    """One observation and one call of the policy; returns the actions to execute, (7,) each."""
    environment = moment.environment
    if settings.blank_images:
        shape = (environment.resolution, environment.resolution, 3)
        given = [np.full(shape, BLANK_LEVEL, dtype=np.uint8) for _ in settings.cameras]
    else:
        given = moment.views
    observation: Observation = dict(zip(settings.cameras, given, strict=True))
    observation["state"] = environment.state()

    where = (start.task.suite, start.task.index, start.initial_state, start.trial, len(record.latency_ms))
    began = time.perf_counter()
    (answer,) = agent.answer([Request(observation, start.instruction, look_seed(start.seed, *where))])
    record.latency_ms.append(round(1000 * (time.perf_counter() - began), 3))
    for stage, milliseconds in answer.stage_ms.items():
        record.stage_ms.setdefault(stage, []).append(milliseconds)

    if answer.kept is not None:
        record.tokens_kept.append(int(answer.kept.sum()))
        record.num_visual_tokens = int(answer.kept.size)
    for observer in observers:
        observer.look(moment, observation, answer)
    return list(np.asarray(answer.actions, np.float64)[: settings.open_loop_steps])
