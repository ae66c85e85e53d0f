"""An agent that asks a policy server: anybody's policy, under the same protocol as our own checkpoints.

What goes over the wire follows one of two conventions:

- `openpi`: as the LIBERO example of openpi (https://github.com/Physical-Intelligence/openpi) asks its server. Pictures
  are resized to 224 px, actions carry the simulator's gripper (-1 open, +1 close).
- `lightvla`: the keys and actions of `prismatic.policy.Policy`, for servers of this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from experiments.robot.libero.policies.contract import ActionChunk, Observation, PolicyQuery
from experiments.robot.libero.simulator.environment import CAMERAS
from prismatic.serving.client import PolicyClient, PolicyServerError, Reply
from prismatic.vla.robots import LIBERO, RobotSpec

OPENPI_IMAGE_SIZE = 224
OPENPI_OPEN_LOOP_STEPS = 5
"""Actions executed of each chunk unless `--num_open_loop_steps` says otherwise: `replan_steps` of openpi's example."""

_PROBE_INSTRUCTION, _PROBE_RESOLUTION, _PROBE_LEVEL = "put the bowl on the plate", 256, 127


def resize_with_padding(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> (size, size, 3): bilinear with antialiasing, sides in proportion, black borders where needed.

    Equal to `openpi_client.image_tools.resize_with_pad`.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    shrink = max(height / size, width / size)
    inner_height, inner_width = int(height / shrink), int(width / shrink)
    inner = Image.fromarray(image).resize((inner_width, inner_height), Image.Resampling.BILINEAR)
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    padded = np.zeros((size, size, 3), np.uint8)
    padded[top : top + inner_height, left : left + inner_width] = np.asarray(inner)
    return padded


def openpi_observation(query: PolicyQuery) -> dict[str, Any]:
    """What openpi's LIBERO example sends. Rollouts' pictures are turned by 180 degrees already, as it turns its own."""
    seen = query.observation
    return {
        "observation/image": resize_with_padding(seen["full_image"], OPENPI_IMAGE_SIZE),
        "observation/wrist_image": resize_with_padding(seen["wrist_image"], OPENPI_IMAGE_SIZE),
        "observation/state": seen["state"],
        "prompt": query.instruction,
    }


def lightvla_observation(query: PolicyQuery) -> dict[str, Any]:
    """The observation as `Policy` takes it, with the instruction as `prompt` and the policy query's random `seed`.

    `session` names who asks, one episode after another, and `query` is the number of the query in its episode: with 0
    a policy with a memory takes another one.
    """
    asked = {"prompt": query.instruction, "seed": query.seed, "session": query.session, "query": query.number}
    return {**query.observation, **asked}


def to_policy_gripper(actions: ArrayLike) -> NDArray[np.float64]:
    """Actions (..., 7) with the simulator's gripper (-1 open, +1 close) -> with the policy's (1 open, 0 closed).

    robosuite moves the fingers by the gripper's sign alone (`PandaGripper.format_action`), and 0 holds them. So does
    what `LiberoEnvironment.step_policy` makes of the sign: the simulator does bit for bit what the server's own numbers
    would make it do, however small they are.
    """
    actions = np.array(actions, dtype=np.float64)
    actions[..., 6] = (1.0 - np.sign(actions[..., 6])) / 2.0
    return actions


def as_float64(actions: ArrayLike) -> NDArray[np.float64]:
    return np.array(actions, dtype=np.float64)


@dataclass(frozen=True)
class Convention:
    """How a policy query becomes a message, and a message actions.

    Args:
        robot: its defaults; a server's own metadata may say more.
        encode: a policy query as it is sent.
        decode: the server's actions (horizon, 7) as rollouts take them.
        assumptions: what cannot be seen from here.
    """

    robot: RobotSpec
    encode: Callable[[PolicyQuery], dict[str, Any]]
    decode: Callable[[ArrayLike], NDArray[np.float64]]
    assumptions: tuple[str, ...] = ()


CONVENTIONS = {
    "openpi": Convention(
        replace(LIBERO, open_loop_steps=OPENPI_OPEN_LOOP_STEPS),
        openpi_observation,
        to_policy_gripper,
        ("the server takes observations and returns actions as in openpi's LIBERO example (gripper: + closes)",),
    ),
    "lightvla": Convention(LIBERO, lightvla_observation, as_float64),
}


class RemoteAgent:
    """A policy server as rollouts see it; the contract is `experiments.robot.libero.policies.contract.Agent`.

    The server is asked once about grey pictures before anything else: that checks its actions, tells the length of its
    chunks, and lets it compile. A server of this project may say more about itself in its metadata: `convention`,
    `robot` (as `RobotSpec.to_json`), `cameras`, `center_crop`, and `policy`, a description for the results.

    Args:
        url: ws://host:port or wss://host:port.
        convention: a key of CONVENTIONS; None: what the server's metadata says, else `openpi`.
        timeout_s: how long a reply may take.

    Raises:
        ValueError: for an unusable address or an unknown convention.
        PolicyServerError: when there is no such server, or its metadata or actions cannot be used.
    """

    def __init__(self, url: str, convention: str | None = None, timeout_s: float = 300.0) -> None:
        if convention is not None and convention not in CONVENTIONS:
            raise ValueError(f"unknown --policy_convention {convention!r}; known: {', '.join(CONVENTIONS)}")
        self._client = PolicyClient(url, timeout_s)
        try:
            self.convention, self._assumptions = self._choose_convention(convention)
            self._convention = CONVENTIONS[self.convention]
            self.robot, self.cameras, self.center_crop = self._served_policy()
            self._chunk_length: int | None = None
            self._chunk_length = len(self.query([self._probe()])[0].actions)
        except BaseException:
            self._client.close()
            raise
        self.robot = replace(self.robot, chunk_length=self._chunk_length)

    def description(self) -> dict[str, Any]:
        """What the server says about its policy under `policy`, and what is known from here."""
        metadata = _plain(self._client.metadata)
        served = metadata.get("policy")
        assumed = served.get("assumptions") if isinstance(served, dict) else None
        return {
            "device_name": "unknown",
            **(served if isinstance(served, dict) else {}),
            "policy_url": self._client.url,
            "policy_convention": self.convention,
            "server_metadata": metadata,
            "robot": _plain(self.robot.to_json()),
            "center_crop": self.center_crop,
            "num_images": len(self.cameras),
            "assumptions": [*(assumed if isinstance(assumed, list) else []), *self._assumptions],
        }

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        """One action chunk per policy query, in order; several are sent at once, each over its own connection."""
        requests = [self._convention.encode(query) for query in queries]
        return [self._read(reply) for reply in self._client.infer_batch(requests)]

    def close(self) -> None:
        self._client.close()

    def _choose_convention(self, asked: str | None) -> tuple[str, list[str]]:
        served = self._client.metadata.get("convention")
        known = served if isinstance(served, str) and served in CONVENTIONS else None
        assumptions = []
        if asked is None and served is None:
            assumptions.append("the server's metadata names no convention: openpi's")
        elif asked is None and known is None:
            raise self._error(
                f"names the convention {served!r}; known: {', '.join(CONVENTIONS)}; choose by --policy_convention"
            )
        elif asked is not None and served is not None and asked != known:
            assumptions.append(f"--policy_convention {asked}, although the server names {served!r}")
        name = asked or known or "openpi"
        return name, [*assumptions, *CONVENTIONS[name].assumptions]

    def _served_policy(self) -> tuple[RobotSpec, tuple[str, ...], bool]:
        """Robot, cameras and whether the policy sees the pictures' central part only."""
        robot, metadata = self._convention.robot, self._client.metadata
        if self.convention == "openpi":
            return robot, robot.cameras, False
        try:
            if "robot" in metadata:
                robot = RobotSpec.from_json(metadata["robot"])
            else:
                self._assumptions.append(f"the server's metadata names no robot: {robot.name}, with its defaults")
            _check_robot(robot)
            cameras = _camera_names(metadata.get("cameras", robot.cameras))
            center_crop = metadata.get("center_crop", False)
            if not isinstance(center_crop, bool | np.bool_):
                raise ValueError(f"center_crop is {center_crop!r}; expected true or false")
        except (ValueError, TypeError, AttributeError) as error:
            raise self._error(f"has unusable metadata: {error}") from error
        numbers = (robot.state_key, robot.proprio_dim, robot.action_dim)
        if numbers != (LIBERO.state_key, LIBERO.proprio_dim, LIBERO.action_dim) or not set(cameras) <= set(CAMERAS):
            raise self._error(
                f"drives robot {robot.name!r} with cameras {list(cameras)}, state {robot.proprio_dim} and actions "
                f"{robot.action_dim}; LIBERO's robot has {list(CAMERAS)}, {LIBERO.proprio_dim} and {LIBERO.action_dim}"
            )
        return robot, cameras, bool(center_crop)

    def _probe(self) -> PolicyQuery:
        shape = (_PROBE_RESOLUTION, _PROBE_RESOLUTION, 3)
        seen: Observation = {camera: np.full(shape, _PROBE_LEVEL, np.uint8) for camera in self.cameras}
        seen["state"] = np.zeros(self.robot.proprio_dim)
        return PolicyQuery(seen, _PROBE_INSTRUCTION)

    def _read(self, reply: Reply) -> ActionChunk:
        content = reply.content
        actions = self._convention.decode(self._checked_actions(content))
        kept = picks = None
        if content.get("kept") is not None:
            try:
                kept = np.asarray(content["kept"])
                picks = None if content.get("picks") is None else np.asarray(content["picks"], np.float32)
            except (ValueError, TypeError) as error:
                raise self._error(f"returned unusable kept or picks: {error}") from error
            if kept.dtype != np.bool_ or kept.ndim != 1:
                raise self._error(f"returned kept as {kept.dtype} {kept.shape}; expected bool (V,)")
            if picks is not None and picks.shape != kept.shape:
                raise self._error(f"returned picks of shape {picks.shape} with kept of {kept.shape}")
        stages = stage_milliseconds(reply)
        # How many queries the server puts together is its own affair, and so is how long this one waited there, if it
        # says what its policy took.
        return ActionChunk(actions, kept, picks, stages, policy_ms=stages.get("server", stages["total"]))

    def _checked_actions(self, content: Mapping[Any, Any]) -> NDArray[Any]:
        if "actions" not in content:
            raise self._error(f"returned no actions but {sorted(map(str, content))}")
        try:
            actions = np.asarray(content["actions"])
        except ValueError as error:
            raise self._error(f"returned unusable actions: {error}") from error
        expected = f"expected numbers (horizon, {LIBERO.action_dim})"
        if actions.dtype.kind not in "fiu" or actions.ndim != 2 or actions.shape[1] != LIBERO.action_dim:
            raise self._error(f"returned actions as {actions.dtype} {actions.shape}; {expected}")
        if not len(actions):
            raise self._error(f"returned no action at all; {expected}")
        if self._chunk_length is not None and len(actions) != self._chunk_length:
            raise self._error(f"returned {len(actions)} actions; expected {self._chunk_length}, as at first")
        if not np.isfinite(actions).all():
            bad = np.argwhere(~np.isfinite(actions))[0].tolist()
            raise self._error(f"returned actions with NaN or infinity, first at {bad}")
        return actions

    def _error(self, what: str) -> PolicyServerError:
        return PolicyServerError(f"the policy server at {self._client.url} {what}")


def stage_milliseconds(reply: Reply) -> dict[str, float]:
    """`total` by this side's clock, and what the server's `server_timing` says: `infer_ms` as `server`, others by name.

    What names the previous reply (`prev_total_ms` of openpi's server) is left out, and so is what is no finite number.
    """
    stages = {"total": round(1000 * reply.seconds, 3)}
    timing = reply.content.get("server_timing")
    for key, value in timing.items() if isinstance(timing, dict) else ():
        name, number = str(key).removesuffix("_ms"), _finite(value)
        if number is not None and name != "total" and not name.startswith("prev_"):
            stages["server" if name == "infer" else name] = round(number, 3)
    return stages


def _finite(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _camera_names(cameras: Any) -> tuple[str, ...]:
    """Raises ValueError for anything but names of cameras, each once."""
    names = cameras.tolist() if isinstance(cameras, np.ndarray) else cameras
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not listed or not names or len(set(names)) < len(names):
        raise ValueError(f"cameras is {cameras!r}; expected a list of one or more of {list(CAMERAS)}, each once")
    return tuple(names)


def _check_robot(robot: RobotSpec) -> None:
    """Raises ValueError for facts of other types than those of LIBERO's robot, and for an impossible pace."""
    for name in (f.name for f in fields(RobotSpec) if f.name != "control"):  # which the simulator's own robot has
        value, expected = getattr(robot, name), type(getattr(LIBERO, name))
        fits = isinstance(value, int | float if expected is float else expected)
        if not fits or isinstance(value, bool) != (expected is bool):
            raise ValueError(f"the robot's {name} is {value!r}; expected a {expected.__name__}")
    if not (math.isfinite(robot.control_rate_hz) and robot.control_rate_hz > 0):
        raise ValueError(f"the robot's control_rate_hz is {robot.control_rate_hz}; expected a number above 0")
    if robot.open_loop_steps < 1:
        raise ValueError(f"the robot's open_loop_steps is {robot.open_loop_steps}; expected 1 or more")


def _plain(value: Any) -> Any:
    """A server's metadata as JSON takes it, which knows neither NaN nor infinity: those become text."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
