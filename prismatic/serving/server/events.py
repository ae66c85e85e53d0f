"""What a policy server tells those who watch it: one event per answered policy query, one per refused one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Answered:
    """A policy query and the action chunk that was sent for it. Watchers share the arrays: nobody writes to them.

    Attributes:
        request_id: as in the logs.
        time: when the request had come, in seconds since 1970.
        connection: who asked: one websocket from its opening to its end, or one HTTP client.
        session: the episode as the client names it, else the connection's own name.
        query: the number of the query in its episode, from 0.
        observation: the policy's cameras, uint8 (H, W, 3) as they came, and its state, (P,) float64.
        instruction: the sentence.
        actions: (chunk, action_dim) float64 in the robot's units and the policy's own convention, whatever the wire's;
            clipped, where that was chosen.
        kept: (V,) bool, the visual tokens that stayed; V counts image by image, inside an image row by row.
        picks, scores: (V,) float32 as in `TokenSelection`, or None.
        executed: (n, action_dim) float64, the actions that the client says it has executed since its last request, in
            the policy's convention; None where it does not say. With query 0 they are the last of the episode before.
        warnings: what was flagged, a sentence each: action dimensions outside the training data's bounds.
        timing: milliseconds: `queue` (waiting for the policy), `preprocessing`, `vision`, `pruner`, `llm`, `infer` (the
            policy's call) and `total` (from the request to the answer); `batch` is how many were answered together.
    """

    request_id: str
    time: float
    connection: str
    session: str
    query: int
    observation: Mapping[str, NDArray[Any]]
    instruction: str
    actions: NDArray[np.float64]
    kept: NDArray[np.bool_] | None = None
    picks: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None
    executed: NDArray[np.float64] | None = None
    warnings: tuple[str, ...] = ()
    timing: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """A request that got no actions.

    Attributes:
        request_id, time, connection: as of an answer.
        reason: the sentence that was sent.
        code: a word for counting: `bad_request`, `unauthorized`, `too_large`, `too_many`, `policy`, `shutdown`.
    """

    request_id: str
    time: float
    connection: str
    reason: str
    code: str


@dataclass(frozen=True)
class ConnectionChanged:
    """A client came or went.

    Attributes:
        connection: its name.
        address: where it calls from.
        is_open: whether it has come.
        time: seconds since 1970.
    """

    connection: str
    address: str
    is_open: bool
    time: float


Event = Answered | Refused | ConnectionChanged


class Watcher(Protocol):
    """Somebody who is told of every event: the page, a recorder, the metrics.

    Called in one thread of the server's own, behind the answer, in the order of the answers. A watcher that is too slow
    misses events, which is counted and logged; what it raises is logged, and changes no answer.
    """

    def tell(self, event: Event) -> None:
        """Take note of one event."""

    def close(self) -> None:
        """The server has answered its last request."""
