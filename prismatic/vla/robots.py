"""What a robot is to a policy: cameras, state, actions, conventions. One small entry per robot."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

NormalizationKind = Literal["bounds_q99", "bounds"]
ActionKind = Literal["delta", "absolute"]

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Control:
    """How a robot executes actions: what they mean, what it must never be sent, what makes it stand still.

    Attributes:
        kind: `delta`: a motion within one control step, so that zeros stand still; `absolute`: where the joints shall
            be, so that the last command stands still.
        grippers: dimensions of an action that are grippers. They are positions whatever the others are.
        gripper_at_rest: what leaves a gripper as it is that was never commanded; None: what its state measures, for
            robots whose state has the dimensions of their actions.
        bounds: per dimension lowest and highest value, or None; empty: none at all. Of deltas this is the step size.
        max_change: per dimension the largest difference between the actions of two control steps, or None; empty: none
            at all. Times the control rate it is a velocity for `absolute` actions, an acceleration for deltas.
    """

    kind: ActionKind
    grippers: tuple[int, ...] = ()
    gripper_at_rest: float | None = None
    bounds: tuple[Bounds | None, ...] = ()
    max_change: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("delta", "absolute"):
            raise ValueError(f"actions of the kind {self.kind!r}; expected 'delta' or 'absolute'")
        numbers = [n for pair in self.bounds if pair is not None for n in pair]
        numbers += [n for n in (*self.max_change, self.gripper_at_rest) if n is not None]
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError(
                f"limits {self.bounds}, {self.max_change}: expected finite numbers, or none for a dimension"
            )
        if any(pair is not None and (len(pair) != 2 or not pair[0] < pair[1]) for pair in self.bounds):
            raise ValueError(f"bounds {self.bounds}: expected (lowest, highest), or none for a dimension")
        if any(n is not None and n <= 0 for n in self.max_change):
            raise ValueError(f"max_change {self.max_change}: expected numbers above 0, or none for a dimension")
        if not all(isinstance(n, int) and n >= 0 for n in self.grippers):
            raise ValueError(f"grippers {self.grippers}: expected dimensions of an action, from 0")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Control":
        """From what `dataclasses.asdict` gave, through JSON or not.

        Raises ValueError on keys that no control has, and on limits that are none.
        """
        if not isinstance(data, dict) or "kind" not in data:
            raise ValueError(f"the robot's control is {data!r}; expected a dictionary with a `kind`")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"the robot's control has unknown keys {unknown}; known are {sorted(known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in data.items()}
        values["bounds"] = tuple(pair if pair is None else tuple(pair) for pair in values.get("bounds", ()))
        return cls(**values)


@dataclass(frozen=True)
class RobotSpec:
    """Facts about a robot that the data, the policy and the robot's own side must agree on.

    Attributes:
        name: key in `ROBOTS`.
        cameras: observation keys of the images, in the order in which the model reads them.
        image_rotation_degrees: rotation between the raw camera image and what the model sees. Stored datasets are
            already rotated; whoever grabs frames from the robot (or simulator) applies it.
        state_key: observation key of the joint state.
        proprio_dim: length of the state vector.
        action_dim: length of one action.
        chunk_length: actions predicted at once.
        open_loop_steps: actions executed before the next policy query.
        control_rate_hz: control steps per second.
        action_mask: per action dimension, whether it is normalised (false: passes through, as the gripper does).
        normalization: `bounds_q99` maps the 1st and 99th percentile to -1 and 1; `bounds` maps minimum and maximum.
        canonical_quaternion: whether the axis-angle part of the state was made from a quaternion with x >= 0 first
            (published LIBERO data was not).
        control: how actions are executed, for whoever drives the robot; None: not known. A policy does not depend on
            it, so that of a robot in `ROBOTS` is not stored: whatever is known of it now applies to old checkpoints.
    """

    name: str
    cameras: tuple[str, ...] = ("full_image", "wrist_image")
    image_rotation_degrees: int = 180
    state_key: str = "state"
    proprio_dim: int = 8
    action_dim: int = 7
    chunk_length: int = 8
    open_loop_steps: int = 8
    control_rate_hz: float = 20.0
    action_mask: tuple[bool, ...] = (True, True, True, True, True, True, False)
    normalization: NormalizationKind = "bounds_q99"
    canonical_quaternion: bool = False
    control: Control | None = None

    @property
    def action_names(self) -> tuple[str, ...]:
        """What the dimensions of an action are; their numbers where that is not known."""
        names = _ACTION_NAMES.get(self.name, ())
        return names if len(names) == self.action_dim else tuple(f"action {n}" for n in range(self.action_dim))

    @property
    def num_action_tokens(self) -> int:
        """Sequence positions that one action chunk takes (chunk length x action dimension)."""
        return self.chunk_length * self.action_dim

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for `config.json`."""
        data: dict[str, Any] = _as_lists(asdict(self))
        if self.control == _known_control(self.name):
            del data["control"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RobotSpec":
        """Inverse of `to_json`. Raises ValueError on keys that no robot has."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"robot description has unknown keys {unknown}; known are {sorted(known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        if "control" not in data:
            values["control"] = _known_control(data.get("name"))
        elif data["control"] is not None:
            values["control"] = Control.from_json(data["control"])
        return cls(**values)


def misfits(one: RobotSpec, other: RobotSpec) -> list[str]:
    """The facts in which two robots differ that one policy cannot drive both."""
    names = ("cameras", "proprio_dim", "action_dim", "chunk_length", "action_mask", "normalization")
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _known_control(name: Any) -> Control | None:
    return ROBOTS[name].control if isinstance(name, str) and name in ROBOTS else None


LIBERO = RobotSpec(
    name="libero",
    control=Control("delta", grippers=(6,), gripper_at_rest=0.5, bounds=(*((-1.0, 1.0),) * 6, None)),
)
"""robosuite's OSC_POSE cuts deltas to [-1, 1], which are 5 cm and 0.5 rad in a control step. A gripper of 0.5 rests."""

_VX300S_JOINTS = (
    (-3.14158, 3.14158),  # waist
    (-1.85005, 1.25664),  # shoulder
    (-1.76278, 1.6057),  # elbow
    (-3.14158, 3.14158),  # forearm
    (-1.8675, 2.23402),  # wrist, its angle
    (-3.14158, 3.14158),  # wrist, its rotation
)
_VX300S_RAD_PER_S = 3.14159
_ALOHA_HZ = 25.0

ALOHA = RobotSpec(
    name="aloha",
    cameras=("full_image", "left_wrist_image", "right_wrist_image"),
    image_rotation_degrees=0,
    proprio_dim=14,
    action_dim=14,
    chunk_length=25,
    open_loop_steps=25,
    control_rate_hz=_ALOHA_HZ,
    action_mask=(True,) * 14,
    normalization="bounds",
    control=Control(
        "absolute",
        grippers=(6, 13),
        bounds=(*_VX300S_JOINTS, None) * 2,
        max_change=(*(_VX300S_RAD_PER_S / _ALOHA_HZ,) * 6, None) * 2,
    ),
)
"""Two ViperX 300s: joint angles in radians and a gripper each; limits are those of its description by Interbotix."""

BRIDGE = RobotSpec(
    name="bridge",
    cameras=("full_image",),
    image_rotation_degrees=0,
    proprio_dim=7,
    chunk_length=5,
    open_loop_steps=5,
    control_rate_hz=5.0,
    control=Control("delta", grippers=(6,)),
)
"""WidowX of BridgeData V2: state and actions are position (3), roll, pitch, yaw (3), gripper, which passes through.

Its limits are not known here.
"""

_ACTION_NAMES: dict[str, tuple[str, ...]] = {
    # An axis times an angle, though the data's own labels say roll, pitch, yaw.
    "libero": ("x", "y", "z", "rot x", "rot y", "rot z", "gripper"),
    "aloha": tuple(
        f"{side} {joint}"
        for side in ("left", "right")
        for joint in ("waist", "shoulder", "elbow", "forearm", "wrist angle", "wrist rotation", "gripper")
    ),
    "bridge": ("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
}

ROBOTS: dict[str, RobotSpec] = {robot.name: robot for robot in (LIBERO, ALOHA, BRIDGE)}


def get_robot(name: str) -> RobotSpec:
    """The robot of that name. Raises ValueError listing the known ones."""
    if name not in ROBOTS:
        raise ValueError(
            f"unknown robot {name!r}; known: {', '.join(sorted(ROBOTS))}. Add one in prismatic/vla/robots.py"
        )
    return ROBOTS[name]
