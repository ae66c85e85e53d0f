"""Runs a robot on action chunks: what to send it in each control step, so that nothing stale is ever executed.

An action belongs to the control step that its chunk's observation foresaw: the i-th one is executed as the i-th after
that observation. Delay is therefore counted in actions: of a chunk that arrives when n actions have been executed since
its observation was taken, the first n are skipped. While the robot holds nothing is executed, and nothing is skipped.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prismatic.serving.action_limits import ActionLimits, control_of, hold_action
from prismatic.serving.asking import Acting, Asker, InThreads, Observation, Pending
from prismatic.serving.ensembling import ensembled
from prismatic.serving.executed import Action, Dropped, Hold, Record, Source
from prismatic.serving.watchdog import Watchdog
from prismatic.vla.robots import RobotSpec

logger = logging.getLogger(__name__)

_RECENT_ANSWERS = 5
_ROUNDING_S = 1e-9
_LOG_LENGTH = 20_000


@dataclass(frozen=True)
class RunnerSettings:
    """How a robot is run.

    Args:
        asynchronous: ask for the next chunk while the present one is executed; else ask when it is used up, and hold
            until the answer is there.
        open_loop_steps: actions executed of each chunk, the first ones; None: as the robot says. Asynchronously it says
            when the next chunk shall take over: what comes earlier does so at once, and while it is late the rest of
            the present chunk is executed, too.
        lead_steps: how many control steps before that the next chunk is asked for; None: as many as the last few
            answers took, the slowest of them left out.
        max_age_s: an action whose observation is older is not executed; None: twice what a whole chunk lasts.
        hold_after_s: without any action for so long the robot holds until it is re-armed.
        over_limits: what becomes of an action beyond the robot's limits: it is cut (`clip`), or the robot holds until
            it is re-armed (`refuse`).
        ensemble_decay: None: no ensembling. Else an action is the average of what all chunks foresaw for this control
            step, weighted by exp(-ensemble_decay * i), where i = 0 is the oldest chunk (ACT, arXiv 2304.13705, section
            IV-A, has 0.01); a gripper takes their weighted median, which is one of the commands. Ask often then:
            `open_loop_steps=1`.
        retry_s: how long to wait after a request that failed.
    """

    asynchronous: bool = True
    open_loop_steps: int | None = None
    lead_steps: int | None = None
    max_age_s: float | None = None
    hold_after_s: float = 0.5
    over_limits: str = "clip"
    ensemble_decay: float | None = None
    retry_s: float = 0.1

    def __post_init__(self) -> None:
        if self.over_limits not in ("clip", "refuse"):
            raise ValueError(f"over_limits {self.over_limits!r}; expected 'clip' or 'refuse'")
        if self.open_loop_steps is not None and self.open_loop_steps < 1:
            raise ValueError(f"open_loop_steps {self.open_loop_steps}; expected 1 or more, or None")
        if self.lead_steps is not None and self.lead_steps < 0:
            raise ValueError(f"lead_steps {self.lead_steps}; expected 0 or more, or None")
        for name in ("max_age_s", "ensemble_decay", "retry_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value}; expected a number from 0")


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Actions (n, action_dim) of one policy query, whose observation was taken after so many executed actions."""

    number: int
    actions: NDArray[np.float64]
    observed_at: float
    executed_before: int


@dataclass(frozen=True, eq=False)
class _Request:
    number: int
    pending: Pending
    observed_at: float
    executed_before: int
    step: int


class ChunkRunner:
    """Asks a policy, and says in each control step what the robot is sent.

    `step` is called once per control step from the robot's loop, `rearm` and `stop` from anywhere.

    Args:
        policy: what is asked: `PolicyClient`, `Policy`, or an `Asker` of one's own (`InSimulatedTime`).
        robot: its action space, control rate and limits.
        settings: how it is run.
        clock: seconds, which only grow; ages and the watchdog's limit go by it.
        last_command: (action_dim,) that the robot executes as the runner begins, if any: it is held until the first
            action, and the first action may differ from it by the robot's limit.
        on_record: called with everything that goes to the log.

    Raises:
        ValueError: for a robot that does not say how it executes actions, or settings that do not fit it.

    Attributes:
        log: every command, and every action that was dropped; the newest 20,000.
        watchdog: its `history` says why the robot was stopped.
    """

    def __init__(
        self,
        policy: Acting | Asker,
        robot: RobotSpec,
        settings: RunnerSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        last_command: ArrayLike | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        self.robot, self.settings = robot, settings or RunnerSettings()
        control_of(robot)
        self._open_loop = self.settings.open_loop_steps or robot.open_loop_steps
        if self._open_loop > robot.chunk_length:
            raise ValueError(
                f"open_loop_steps {self._open_loop} of chunks of {robot.chunk_length} actions; expected no more"
            )
        chunk_s = robot.chunk_length / robot.control_rate_hz
        self.max_age_s = 2 * chunk_s if self.settings.max_age_s is None else self.settings.max_age_s
        self._asker = policy if isinstance(policy, Asker) else InThreads(policy)
        self._policy, self._clock, self._on_record = policy, clock, on_record
        self._limits = ActionLimits(robot)
        self.watchdog = Watchdog(self.settings.hold_after_s, clock)
        self.log: deque[Record] = deque(maxlen=_LOG_LENGTH)
        self._last = None if last_command is None else self._checked(last_command, 1)
        self._instruction: str | None = None
        self._step, self._executed, self._asked, self._trips = 0, 0, 0, 0
        self._delays: deque[int] = deque(maxlen=_RECENT_ANSWERS)
        self._executed_at: deque[float] = deque(maxlen=2 * robot.chunk_length)
        self._forget()

    def begin(self, instruction: str) -> None:
        """Another episode: forget what was planned, and ask anew. Does not re-arm."""
        self._drop_plans("stopped")
        self._instruction = instruction
        self.watchdog.restart()
        begin = getattr(self._policy, "begin_episode", None)
        if begin is not None:
            begin()

    def step(self, observation: Observation, *, observed_at: float | None = None, wait_s: float = 0.0) -> Action | Hold:
        """What the robot is sent in this control step.

        Args:
            observation: as the policy takes it; the arrays may be overwritten afterwards.
            observed_at: when it was taken, by the runner's clock; None: now.
            wait_s: how long to wait for an answer when there is nothing to execute, and no longer.

        Raises:
            ValueError: before `begin`, and for an observation of the future or one that cannot be held by (see
                `hold_action`). What goes wrong with the policy is never raised: the robot holds, and says why.
        """
        if self._instruction is None:
            raise ValueError("there is no instruction yet; call begin(instruction) first")
        now = self._clock()
        observed_at = now if observed_at is None else observed_at
        if observed_at > now + _ROUNDING_S:
            raise ValueError(f"the observation was taken {observed_at - now:.3f} s in the future by the runner's clock")
        self._receive(0.0)
        if self._may_move():
            self._ask_if_due(observation, observed_at, now)
            self._receive(0.0)
            if wait_s > 0 and not self._executable(now):
                self._receive(wait_s)
            now = self._clock()  # to wait takes time, and so does an observation that is made when it is looked at
            self._may_move()
        command = self._action(observation, now) or self._hold(observation, now)
        self._last = command.values
        self._record(command)
        self._step += 1
        return command

    def rearm(self) -> None:
        """Let a stopped robot go on. It does so on observations taken from now on."""
        self.watchdog.rearm()

    def stop(self, reason: str) -> None:
        """Hold from the next control step on, until `rearm`."""
        self.watchdog.trip(reason)

    def _forget(self) -> None:
        self._request: _Request | None = None
        self._chunks: list[_Chunk] = []  # the one that is followed; under ensembling all with actions left
        self._newest_executed: int | None = None
        self._ask_after = -math.inf
        self._why = "the policy has not answered yet"

    def _may_move(self) -> bool:
        """Whether the watchdog lets the robot move. Nothing that was planned before it tripped is kept."""
        may_move = self.watchdog.check(self._why) is None
        if not may_move or len(self.watchdog.history) > self._trips:  # it may have been re-armed since the last step
            self._trips = len(self.watchdog.history)
            self._drop_plans("stopped")
        return may_move

    def _drop_plans(self, reason: str) -> None:
        for chunk in self._chunks:
            self._drop(chunk.number, range(self._index(chunk), len(chunk.actions)), reason)
        if self._request is not None:
            self._drop(self._request.number, range(0), reason)
        self._forget()

    def _index(self, chunk: _Chunk) -> int:
        """Which of its actions is due."""
        return self._executed - chunk.executed_before

    def _ask_if_due(self, observation: Observation, observed_at: float, now: float) -> None:
        if self._request is not None or now < self._ask_after:
            return
        if observed_at < self.watchdog.armed_at:
            self._why = "the observation is from before the robot was re-armed"
            return
        newest = self._newest_executed
        if newest is not None and self._executed - newest < self._open_loop - self._lead():
            return
        assert self._instruction is not None  # `step` has looked
        number, self._asked = self._asked, self._asked + 1
        try:
            pending = self._asker.ask(observation, self._instruction)
        except Exception as error:
            self._fail(number, error)
            return
        since = sum(time >= observed_at for time in self._executed_at) if observed_at < now else 0
        self._request = _Request(number, pending, observed_at, self._executed - since, self._step)

    def _lead(self) -> int:
        """How many control steps before a chunk is used up the next one is asked for."""
        if not self.settings.asynchronous:
            return 0
        if self.settings.lead_steps is not None:
            return self.settings.lead_steps
        # One slow answer, as the first of all often is, must not make the next chunks old before their turn.
        slowest_first = sorted(self._delays, reverse=True)
        return next(iter(slowest_first[1:] or slowest_first), 0)

    def _receive(self, wait_s: float) -> None:
        """Take the answer, if it is there."""
        request = self._request
        if request is None or not request.pending.wait(wait_s):
            return
        self._request = None
        try:
            actions = self._checked(request.pending.result(), 2)
        except Exception as error:
            self._fail(request.number, error)
            return
        self._delays.append(self._step - request.step)
        self._newest_executed = request.executed_before
        skipped = min(self._executed - request.executed_before, len(actions))
        if skipped:
            self._drop(request.number, range(skipped), "late")
        if skipped < len(actions):
            chunk = _Chunk(request.number, actions, request.observed_at, request.executed_before)
            self._chunks = [chunk] if self.settings.ensemble_decay is None else [*self._chunks, chunk]
        self._why = "the next chunk has not come yet"

    def _checked(self, values: ArrayLike, dimensions: int) -> NDArray[np.float64]:
        actions = np.array(values, np.float64)
        if actions.ndim != dimensions or actions.shape[-1] != self.robot.action_dim or not len(actions):
            chunk = "chunk, " if dimensions == 2 else ""
            raise ValueError(f"actions of shape {actions.shape}; expected ({chunk}{self.robot.action_dim})")
        if not np.isfinite(actions).all():
            raise ValueError("actions with NaN or infinity")
        return actions

    def _fail(self, number: int, error: Exception) -> None:
        self._why = f"the policy failed: {error}"
        self._ask_after = self._clock() + self.settings.retry_s
        logger.warning("policy query %d failed (%s: %s)", number, type(error).__name__, error)
        self._drop(number, range(0), f"failed: {error}")

    def _executable(self, now: float) -> list[_Chunk]:
        """Chunks with an action for this control step, the oldest first: one, and under ensembling all."""
        if not self.settings.asynchronous and (self._request is not None or self._is_used_up()):
            return []
        self._drop_old(now)
        return self._chunks

    def _is_used_up(self) -> bool:
        return self._newest_executed is None or self._executed - self._newest_executed >= self._open_loop

    def _drop_old(self, now: float) -> None:
        """Chunks that are used up go; those whose observation is too old go, and the log says so."""
        oldest = now - self.max_age_s - _ROUNDING_S
        kept = []
        for chunk in self._chunks:
            left = range(self._index(chunk), len(chunk.actions))
            if left and chunk.observed_at >= oldest:
                kept.append(chunk)
            elif left:
                self._drop(chunk.number, left, "stale")
                self._why = f"what came was older than {self.max_age_s:g} s"
        self._chunks = kept
        if not kept and self._request is None:
            self._newest_executed = None  # ask at once

    def _action(self, observation: Observation, now: float) -> Action | None:
        """The action that is due, within the limits; None where there is none."""
        if self.watchdog.tripped or not (chunks := self._executable(now)):
            return None
        foreseen = np.stack([chunk.actions[self._index(chunk)] for chunk in chunks])
        decay = self.settings.ensemble_decay
        wanted = foreseen[0] if decay is None else ensembled(foreseen, decay, control_of(self.robot).grippers)
        previous = hold_action(self.robot, None, observation) if self._last is None else self._last
        values, limited = self._limits.apply(wanted, previous)
        if limited and self.settings.over_limits == "refuse":
            self.watchdog.trip(f"the policy wants more than the robot's limits in dimensions {list(limited)}: {wanted}")
            self._drop_plans("stopped")
            return None
        sources = tuple(Source(chunk.number, self._index(chunk), chunk.observed_at) for chunk in chunks)
        self._executed += 1
        self._executed_at.append(now)
        self.watchdog.feed()
        return Action(values, self._step, now, sources, limited)

    def _hold(self, observation: Mapping[str, Any], now: float) -> Hold:
        tripped = self.watchdog.tripped
        values = hold_action(self.robot, self._last, observation)
        reason = self._why if tripped is None else tripped.reason
        return Hold(values, self._step, now, reason, needs_rearm=tripped is not None)

    def _drop(self, chunk: int, actions: range, reason: str) -> None:
        self._record(Dropped(chunk, actions, self._step, self._clock(), reason))

    def _record(self, record: Record) -> None:
        self.log.append(record)
        if self._on_record is not None:
            self._on_record(record)
