"""Requests as they come and answers as they go: names, limits, conventions. Nothing here knows the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismatic.serving.settings import ServerConfig
from prismatic.vla.observation import read_observation
from prismatic.vla.robots import RobotSpec

_OPENPI_CAMERAS = {"full_image": "observation/image", "wrist_image": "observation/wrist_image"}
_OPENPI_STATE = "observation/state"
_ABOUT = ("seed", "session", "query", "id", "executed")
LONGEST_NAME = 128
"""Characters of a session's name and of an id."""
_SHOWN = 5
_MOST_EXECUTED = 10_000


class Refusal(Exception):
    """A request that gets no actions.

    Args:
        code: a word for counting, as of `events.Refused`.
        reason: the sentence for who asked: what came, what was expected, the remedy. Never a traceback.
    """

    def __init__(self, code: str, reason: str) -> None:
        # It may quote what came: half characters cannot be sent, and nobody is sent back what he sent.
        reason = _short(reason.encode(errors="backslashreplace").decode())
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True, eq=False)
class PolicyRequest:
    """A policy query, checked.

    Attributes:
        observation: the policy's cameras, uint8 (H, W, 3), and its state, (P,) float64, by the robot's own keys.
        instruction: the sentence.
        seed: of what is random about the actions; None: any.
        session: the episode, unique in this server.
        remembers: whether the policy's memory of that episode takes part; else the request stands for itself.
        query: its number in the episode; None: one more than the last.
        id: what the client calls it; None: nothing.
        executed: (n, action_dim) the actions executed since the client's last request, in the policy's convention;
            None where it does not say.
        notes: what it had that nobody reads, a sentence each.
    """

    observation: Mapping[str, NDArray[Any]]
    instruction: str
    seed: int | None = None
    session: str = ""
    remembers: bool = True
    query: int | None = None
    id: int | str | None = None
    executed: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PolicyResponse:
    """What the policy answered; attributes as of `events.Answered`, `query` and `session` as they were counted."""

    actions: NDArray[np.float64]
    kept: NDArray[np.bool_]
    picks: NDArray[np.float32]
    scores: NDArray[np.float32] | None
    session: str
    query: int
    warnings: tuple[str, ...] = ()
    timing: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Names:
    """What the keys of requests are called.

    Attributes:
        cameras: those that the policy reads, in its order.
        state: of the robot's state; None where the policy reads none.
        instruction: of the sentence.
        remedy: what to say to a request that looks like the other convention's.
    """

    cameras: tuple[str, ...]
    state: str | None
    instruction: str
    remedy: str = ""

    @property
    def needed(self) -> list[str]:
        """All that a request must have."""
        return [*self.cameras, *([] if self.state is None else [self.state]), self.instruction]

    def to_json(self) -> dict[str, Any]:
        return {"cameras": list(self.cameras), "state": self.state, "instruction": self.instruction}


class Reader:
    """Reads the requests of one policy.

    Args:
        robot: whose conventions they follow.
        num_images: how many of its cameras the policy reads.
        use_proprio: whether it reads the state.
        config: convention and limits.

    Raises ValueError where the convention is not for this robot.
    """

    def __init__(self, robot: RobotSpec, num_images: int, use_proprio: bool, config: ServerConfig) -> None:
        self._robot, self._config = robot, config
        self.cameras = robot.cameras[:num_images]
        state = robot.state_key if use_proprio else None
        self.http = Names(self.cameras, state, "instruction")
        if config.convention == "openpi":
            if unknown := set(self.cameras) - set(_OPENPI_CAMERAS):
                raise ValueError(
                    f"--convention openpi names the pictures of LIBERO's robot, and robot {robot.name!r} has the "
                    f"cameras {sorted(unknown)}: use --convention lightvla"
                )
            names = tuple(_OPENPI_CAMERAS[camera] for camera in self.cameras)
            remedy = "a server for these keys is started by --convention lightvla"
            self.websocket = Names(names, _OPENPI_STATE if use_proprio else None, "prompt", remedy)
        else:
            remedy = "a server for openpi's keys is started by --convention openpi"
            self.websocket = Names(self.cameras, state, "prompt", remedy)

    def read(self, message: Any, names: Names, connection: str, remembers: bool = True) -> PolicyRequest:
        """A message of decoded msgpack or JSON -> the request.

        Args:
            message: as it came.
            names: `websocket` or `http`.
            connection: whose session it is where it names none.
            remembers: whether a connection is an episode of its own; HTTP's are nobody's.

        Raises Refusal (`bad_request`, `too_large`) naming the field, what came and what was expected.
        """
        if not isinstance(message, dict):
            raise Refusal("bad_request", f"a request is a dictionary, and {_kind(message)} came")
        keys = {key: value for key, value in message.items() if isinstance(key, str)}
        if missing := [key for key in names.needed if key not in keys]:
            raise Refusal("bad_request", self._lacking(missing, message, names))
        for key in names.needed[:-1]:
            if isinstance(keys[key], list) and not _holds_numbers(keys[key]):
                raise Refusal("bad_request", f"observation[{key!r}] is a list of something else than numbers")
        for camera in names.cameras:
            self._check_size(camera, keys[camera])
        observation = self._observation(keys, names)
        session = _name(keys.get("session"), "session")
        return PolicyRequest(
            observation,
            self._instruction(keys[names.instruction], names.instruction),
            seed=_whole(keys.get("seed"), "seed", 2**63),
            session=session or connection,
            remembers=remembers or bool(session),
            query=_whole(keys.get("query"), "query", 2**53),
            id=_identifier(keys.get("id")),
            executed=self._executed(keys.get("executed"), names),
            notes=self._notes(message, names),
        )

    @property
    def _spare(self) -> set[str]:
        """Keys of either convention; what of them is not needed is no mistake."""
        return {*self._robot.cameras, self._robot.state_key, *_OPENPI_CAMERAS.values(), _OPENPI_STATE}

    def _observation(self, keys: Mapping[str, Any], names: Names) -> dict[str, NDArray[Any]]:
        as_named = replace(self._robot, cameras=names.cameras, state_key=names.state or self._robot.state_key)
        try:
            read = read_observation(keys, as_named, len(names.cameras), names.state is not None)
        except ValueError as error:
            raise Refusal("bad_request", str(error)) from error
        for camera in names.cameras:
            self._check_size(camera, read.images[camera])  # it may have come as a list of rows
        own = dict(zip(self.cameras, (read.images[camera] for camera in names.cameras), strict=True))
        return own if read.state is None else {**own, self._robot.state_key: read.state}

    def _lacking(self, missing: list[str], message: Mapping[Any, Any], names: Names) -> str:
        looks_like_other = bool(self._spare - {*names.needed} & {*map(str, message)}) and missing[0] in names.cameras
        return (
            f"the request lacks {missing}; the policy of robot {self._robot.name!r} needs {names.needed}, and "
            f"{_listed(message) or 'nothing'} came{f'; {names.remedy}' if names.remedy and looks_like_other else ''}"
        )

    def _check_size(self, camera: str, value: Any) -> None:
        """Of an array; lists have none before they are read."""
        shape: tuple[int, ...] = getattr(value, "shape", ())
        side, pixels = self._config.max_side, self._config.max_pixels
        if len(shape) >= 2 and (max(shape[:2]) > side or shape[0] * shape[1] > pixels):
            raise Refusal(
                "too_large",
                f"{camera} is {tuple(shape)}; expected at most {side} pixels a side and {pixels} in all: send a "
                "smaller picture, or start the server with other --max_side and --max_pixels",
            )

    def _instruction(self, value: Any, key: str) -> str:
        most = self._config.max_instruction_bytes
        if isinstance(value, bytes | np.bytes_):
            try:
                value = bytes(value).decode()
            except UnicodeDecodeError:
                raise Refusal("bad_request", f"{key} is bytes that are no UTF-8; expected a sentence") from None
        if not isinstance(value, str):
            raise Refusal("bad_request", f"{key} is {_kind(value)}; expected a sentence")
        if (size := len(value.encode(errors="surrogatepass"))) > most:
            raise Refusal("too_large", f"{key} has {size} bytes; expected at most {most} (--max_instruction_bytes)")
        if not value.strip():
            raise Refusal("bad_request", f"{key} is empty; expected a sentence")
        if not all(sign.isprintable() or sign.isspace() for sign in value):
            raise Refusal("bad_request", f"{key} has characters that cannot be shown; expected a sentence")
        return str(value)

    def _executed(self, value: Any, names: Names) -> NDArray[np.float64] | None:
        """In the convention of the actions that are sent there."""
        if value is None:
            return None
        width = self._robot.action_dim
        try:
            actions = np.asarray(value, np.float64)
        except (ValueError, TypeError):
            actions = np.zeros(0)
        fits = actions.ndim == 2 and actions.shape[1] == width and len(actions) <= _MOST_EXECUTED
        if not fits or not np.isfinite(actions).all():
            raise Refusal(
                "bad_request",
                f"executed is {_kind(value)}; expected the actions executed since the last request, at most "
                f"{_MOST_EXECUTED} rows of {width} finite numbers",
            )
        is_openpi = names is self.websocket and self._config.convention == "openpi"
        return policy_gripper(actions) if is_openpi else actions

    def _notes(self, message: Mapping[Any, Any], names: Names) -> tuple[str, ...]:
        """What was sent for nothing: a mistyped `sesion` would else never be found. Spare cameras are no mistake."""
        spare = {*names.needed, *_ABOUT, *self._spare}
        unread = {key: None for key in message if key not in spare}
        return (f"fields that nobody reads: {_listed(unread)}",) if unread else ()


def reply_of(answer: PolicyResponse, request: PolicyRequest, request_id: str, to_openpi: bool) -> dict[str, Any]:
    """An answer as it goes over the WebSocket."""
    timing = {f"{name}_ms": value for name, value in answer.timing.items() if name != "batch"}
    reply: dict[str, Any] = {
        "actions": simulator_gripper(answer.actions) if to_openpi else answer.actions,
        "kept": answer.kept,
        "picks": answer.picks,
        "server_timing": {**timing, "batch": int(answer.timing.get("batch", 1))},
        "warnings": [*answer.warnings, *request.notes],
        "request_id": request_id,
    }
    return reply if request.id is None else {**reply, "id": request.id}


def simulator_gripper(actions: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 7) with the policy's gripper (1 open, 0 closed) -> with the simulator's (-1 open, +1 close)."""
    turned = actions.copy()
    turned[..., -1] = 1.0 - 2.0 * turned[..., -1]
    return turned


def policy_gripper(actions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of `simulator_gripper`."""
    turned = actions.copy()
    turned[..., -1] = 0.5 * (1.0 - turned[..., -1])
    return turned


def _whole(value: Any, key: str, below: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or not 0 <= value < below:
        raise Refusal("bad_request", f"{key} is {_kind(value)}; expected a whole number from 0, below {below}")
    return int(value)


def _name(value: Any, key: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > LONGEST_NAME or not value.isprintable():
        raise Refusal("bad_request", f"{key} is {_kind(value)}; expected a text of at most {LONGEST_NAME} characters")
    return str(value)


def _identifier(value: Any) -> int | str | None:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise Refusal("bad_request", "id is a whole number of more than 64 bits")
        return int(value)
    return _name(value, "id")


def _holds_numbers(value: list[Any]) -> bool:
    """Whether nested lists hold numbers alone: in an array, each text would take as much as the longest."""
    left: list[Any] = [value]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left.extend(part)
        elif isinstance(part, np.ndarray | np.generic):
            if part.dtype.kind not in "biuf":
                return False
        elif not isinstance(part, int | float):
            return False
    return True


def _kind(value: Any) -> str:
    """What came, short enough for a sentence."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    if isinstance(value, str | int | float | bool | None) and len(shown := repr(value)[:60]) < 60:
        return shown
    return f"a {type(value).__name__}"


def _listed(keys: Mapping[Any, Any]) -> str:
    shown = [re.sub(r"[^ -~]", "?", str(key))[:40] for key in list(keys)[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _short(sentence: str) -> str:
    return sentence if len(sentence) <= 500 else f"{sentence[:500]}..."
