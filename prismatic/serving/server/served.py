"""The policy behind a server: the only module of it that knows `Policy`."""

from __future__ import annotations

import logging
import platform
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

import prismatic
from prismatic.models.batch import Session
from prismatic.policy import Policy, PolicyOutput
from prismatic.serving.server.payloads import PolicyRequest, PolicyResponse, Reader, Refusal
from prismatic.serving.settings import ServerConfig

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_EPISODES_KEPT = 1024
_LEAST_TOLERANCE = 1e-6
"""What rounding alone may add to a dimension that never varied."""


@dataclass
class _Episode:
    """What is remembered between an episode's requests."""

    memory: Session | None
    next_query: int = 0


@dataclass(frozen=True)
class Bounds:
    """What the training data's actions lay within.

    Attributes:
        low, high: (action_dim,) smallest and largest value.
        slack: (action_dim,) how far outside is no news.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    slack: NDArray[np.float64]

    def warnings(self, actions: NDArray[np.float64]) -> tuple[str, ...]:
        """A sentence for each dimension of (chunk, action_dim) actions that leaves the bounds, with its worst step."""
        beyond = np.maximum(self.low - actions, actions - self.high) - self.slack
        return tuple(
            f"action dimension {number} is {actions[step, number]:.4g} in step {step}; the training data's lie "
            f"between {self.low[number]:.4g} and {self.high[number]:.4g}"
            for number, step in enumerate(beyond.argmax(axis=0))
            if beyond[step, number] > 0
        )


class ServedPolicy:
    """A policy, as a server asks it.

    `answer` and what `exclusively` runs never happen at the same time, whatever threads they are called from.

    Args:
        policy: loaded, and best warmed up.
        config: convention, limits and what to do about actions out of bounds.

    Raises ValueError where the convention is not for the policy's robot.
    """

    def __init__(self, policy: Policy, config: ServerConfig) -> None:
        self.policy, self.config = policy, config
        self.reader = Reader(policy.robot, policy.transform.num_images, policy.transform.use_proprio, config)
        self.bounds = _bounds(policy, config.bounds_tolerance)
        self._lock = threading.Lock()
        self._episodes: OrderedDict[str, _Episode] = OrderedDict()
        self._info = self._describe()

    def info(self) -> dict[str, Any]:
        """What this server is and takes: JSON of GET /info, and the WebSocket's greeting."""
        return self._info

    def exclusively(self, function: Callable[[], Result]) -> Result:
        """Run a function between batches, to change the policy (`set_pruner`); `info` is made anew behind it."""
        with self._lock:
            try:
                return function()
            finally:
                self._info = self._describe()

    def answer(self, requests: Sequence[PolicyRequest]) -> list[PolicyResponse]:
        """Ask the policy all at once; answers in the requests' order.

        Args:
            requests: of different sessions.

        Raises:
            Refusal: where the policy computed NaN or broke (`policy`), or will not take what it is asked
                (`bad_request`). Of several requests it does not say which: ask each alone.
        """
        with self._lock:
            began = time.perf_counter()
            episodes = [self._episode(request) for request in requests]
            try:
                output = self.policy.act_batch(
                    [request.observation for request in requests],
                    [request.instruction for request in requests],
                    [e.memory if q.remembers else None for q, e in zip(requests, episodes, strict=True)],
                    seeds=[secrets.randbits(63) if q.seed is None else q.seed for q in requests],
                )
            except ValueError as error:
                raise Refusal("bad_request", str(error)) from error
            except FloatingPointError as error:
                raise Refusal("policy", f"the policy computed no usable actions: {error}") from error
            except Exception as error:
                logger.exception("the policy broke")
                raise Refusal(
                    "policy", f"the policy broke ({type(error).__name__}); the server's log says more"
                ) from error
            took = 1000 * (time.perf_counter() - began)
            for request, episode in zip(requests, episodes, strict=True):
                episode.next_query = _number(request, episode) + 1
            return self._answers(requests, episodes, output, took)

    def warm_up(self) -> float:
        """Let the policy prepare for batches of every size; seconds it took."""
        began = time.perf_counter()
        for size in range(1, self.config.max_batch_size + 1):
            self.policy.warm_up(batch_size=size)
        return time.perf_counter() - began

    def _episode(self, request: PolicyRequest) -> _Episode:
        """The request's, the most recently used last."""
        found = self._episodes.pop(request.session, None)
        if found is None or request.query == 0:
            found = _Episode(self.policy.new_session() if self.policy.uses_sessions else None)
        elif found.memory is None and self.policy.uses_sessions:
            found.memory = self.policy.new_session()
        self._episodes[request.session] = found
        while len(self._episodes) > _EPISODES_KEPT:
            self._episodes.popitem(last=False)
        return found

    def _answers(
        self, requests: Sequence[PolicyRequest], episodes: Sequence[_Episode], output: PolicyOutput, took_ms: float
    ) -> list[PolicyResponse]:
        selection = output.selection
        kept = selection.kept().cpu().numpy()
        picks = np.zeros(kept.shape, np.float32)
        rows = np.arange(len(kept))[:, None]
        np.add.at(picks, (rows, selection.index.cpu().numpy()), selection.count.float().cpu().numpy())
        scores = None if selection.scores is None else selection.scores.float().cpu().numpy()
        stages = {name: round(1000 * seconds, 3) for name, seconds in output.timing.items() if name != "total"}
        timing = {**stages, "infer": round(took_ms, 3), "batch": float(len(requests))}
        found = []
        for row, (request, episode) in enumerate(zip(requests, episodes, strict=True)):
            actions, warnings = self._within_bounds(output.actions[row])
            found.append(
                PolicyResponse(
                    actions,
                    kept[row],
                    picks[row],
                    None if scores is None else scores[row],
                    request.session,
                    episode.next_query - 1,
                    warnings,
                    timing,
                )  # fmt: skip
            )
        return found

    def _within_bounds(self, actions: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        if self.config.out_of_bounds == "allow":
            return actions, ()
        warnings = self.bounds.warnings(actions)
        if self.config.out_of_bounds == "clip":
            return np.clip(actions, self.bounds.low, self.bounds.high), warnings
        return actions, warnings

    def _describe(self) -> dict[str, Any]:
        policy, config = self.policy, self.config
        robot, described = policy.robot, policy.description()
        return {
            "server": "lightvla",
            "convention": config.convention,
            "echoes_id": True,
            "robot": robot.to_json(),
            "cameras": list(self.reader.cameras),
            "center_crop": policy.transform.center_crop,
            "unnorm_key": policy.unnorm_key,
            "num_visual_tokens": policy.model.num_visual_tokens,
            "action_bounds": {name: getattr(self.bounds, name).tolist() for name in ("low", "high", "slack")},
            "out_of_bounds": config.out_of_bounds,
            "pruner": described["pruner"],
            "engine": described["engine"],
            "requests": {"websocket": self.reader.websocket.to_json(), "http": self.reader.http.to_json()},
            "limits": {
                "message_bytes": int(config.max_message_mb * 2**20),
                "side": config.max_side,
                "pixels": config.max_pixels,
                "instruction_bytes": config.max_instruction_bytes,
                "rate_per_s": config.max_rate,
                "batch_size": config.max_batch_size,
                "queue": config.max_queue,
            },
            "versions": {
                "lightvla": prismatic.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "policy": described,
        }


def _number(request: PolicyRequest, episode: _Episode) -> int:
    return episode.next_query if request.query is None else request.query


def _bounds(policy: Policy, tolerance: float) -> Bounds:
    statistics = policy.transform.statistics["action"]
    low, high = (np.asarray(statistics[name], np.float64) for name in ("min", "max"))
    return Bounds(low, high, np.maximum(tolerance * (high - low), _LEAST_TOLERANCE))
