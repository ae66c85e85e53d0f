"""One rollout: query, act open loop, query again, until the goal holds or the steps are used up."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.policies.contract import (
    ActionChunk,
    Observation,
    PolicyQuery,
    Queryable,
    query_seed,
    timed_query,
)
from experiments.robot.libero.policies.watched import PolicyLost
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.motion import rms_jerk
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.simulator.environment import CAMERAS, LiberoEnvironment
from prismatic.pictures.images import Picture

BLANK_LEVEL = 127
"""Grey level of every pixel under the control `blank_images`."""


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

    def on_query(self, moment: Moment, observation: Observation, chunk: ActionChunk) -> None:
        """The policy was given `observation` and returned `chunk`."""
        ...

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        """An action (7,), as the policy returned it, has led to `moment`."""
        ...

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        """The rollout has ended as the record says; not called for an invalid one."""
        ...


class Probe(Observer, Protocol):
    """Asks something of the policy by what it adds to its queries, and keeps what came out."""

    def before_query(self, moment: Moment, query: PolicyQuery) -> PolicyQuery:
        """The query to send in place of this one, which is about `moment`."""
        ...

    def save(self, record: EpisodeRecord, folder: Path, stem: str) -> None:
        """Write what came out of the ended rollout below a folder, under its name without suffix."""
        ...


class Probes(Protocol):
    """Makes a probe for every rollout; goes to worker processes, so that it can be pickled."""

    def probe(self, start: Start) -> Probe: ...


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
    agent: Queryable,
    start: Start,
    settings: RolloutSettings,
    observers: Sequence[Observer] = (),
    probe: Probe | None = None,
) -> EpisodeRecord:
    """Roll out once. An exception on the way makes the rollout invalid, with the traceback in the record.

    With `start.other` the rollout ends as soon as either goal holds. The probe observes it, too.

    Raises:
        PolicyLost: as the agent; it is no matter of this rollout.
    """
    record = new_record(start, settings.control)
    began = time.perf_counter()
    try:
        state = start.initial_state if start.state is None else start.state
        environment.reset(state, seed=start.seed, displacement=start.displacement)
        watching = [*observers, *([] if probe is None else [probe])]
        _act_until_done(environment, _Asked(agent, probe), start, settings, record, watching)
    except PolicyLost:
        raise
    except Exception:
        record.success = record.other_success = None
        record.invalid = traceback.format_exc()
    record.wall_seconds = round(time.perf_counter() - began, 3)
    return record


@dataclass(frozen=True)
class _Asked:
    """Whom a rollout queries, and what changes its queries on the way."""

    agent: Queryable
    probe: Probe | None

    def query(self, moment: Moment, query: PolicyQuery) -> ActionChunk:
        asked = query if self.probe is None else self.probe.before_query(moment, query)
        (chunk,) = timed_query(self.agent, [asked])
        return chunk


def _act_until_done(
    environment: LiberoEnvironment,
    agent: _Asked,
    start: Start,
    settings: RolloutSettings,
    record: EpisodeRecord,
    observers: Sequence[Observer],
) -> None:
    """Fill in everything in the record that depends on acting."""
    own = other = False
    digest = hashlib.sha256()
    path = [environment.position()]
    moment = Moment(environment, settings.cameras, 0)
    while record.steps < settings.max_steps and not (own or other):
        chunk = _query(moment, agent, start, settings, record, observers)
        for action in chunk:
            digest.update(action.tobytes())
            own = environment.step_policy(action)
            other = start.other is not None and environment.succeeded(start.other.goal)
            path.append(environment.position())
            if len(start.task.goal) > 1:
                record.progress = max(record.progress or 0.0, 1.0 if own else environment.progress())
            record.steps += 1
            moment = Moment(environment, settings.cameras, record.steps)
            for observer in observers:
                observer.step(moment, action)
            if own or other or record.steps >= settings.max_steps:
                break
            if settings.render_every_step:
                _ = moment.views
    record.success = own
    jerk = rms_jerk(path, environment.control_rate_hz)
    record.jerk = None if jerk is None else round(jerk, 3)
    record.actions_sha256 = digest.hexdigest()
    record.other_success = None if start.other is None else other
    for observer in observers:
        observer.finish(moment, record)


def _query(
    moment: Moment,
    agent: _Asked,
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
    seed, session = query_seed(start.seed, *where), f"{platform.node()}-{os.getpid()}"
    asked = PolicyQuery(observation, start.instruction, seed, start.task.suite, session, len(record.latency_ms))
    chunk = agent.query(moment, asked)
    record.latency_ms.append(round(1000 * (time.perf_counter() - began), 3))
    assert chunk.policy_ms is not None  # timed_query's
    record.policy_ms.append(chunk.policy_ms)
    record.call_queries.append(chunk.call_queries)
    for stage, milliseconds in chunk.stage_ms.items():
        record.stage_ms.setdefault(stage, []).append(milliseconds)

    if chunk.kept is not None:
        record.tokens_kept.append(int(chunk.kept.sum()))
        record.num_visual_tokens = int(chunk.kept.size)
    for observer in observers:
        observer.on_query(moment, observation, chunk)
    return list(np.asarray(chunk.actions, np.float64)[: settings.open_loop_steps])
