"""What a robot is to a policy: cameras, state, actions, conventions. One small entry per robot."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

NormalizationKind = Literal["bounds_q99", "bounds"]


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

    @property
    def num_action_tokens(self) -> int:
        """Sequence positions that one action chunk takes (chunk length x action dimension)."""
        return self.chunk_length * self.action_dim

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for `config.json`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RobotSpec":
        """Inverse of `to_json`. Raises ValueError on keys that no robot has."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"robot description has unknown keys {unknown}; known are {sorted(known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def misfits(one: RobotSpec, other: RobotSpec) -> list[str]:
    """The facts in which two robots differ that one policy cannot drive both."""
    names = ("cameras", "proprio_dim", "action_dim", "chunk_length", "action_mask", "normalization")
    return [name for name in names if getattr(one, name) != getattr(other, name)]


LIBERO = RobotSpec(name="libero")

ALOHA = RobotSpec(
    name="aloha",
    cameras=("full_image", "left_wrist_image", "right_wrist_image"),
    image_rotation_degrees=0,
    proprio_dim=14,
    action_dim=14,
    chunk_length=25,
    open_loop_steps=25,
    control_rate_hz=25.0,
    action_mask=(True,) * 14,
    normalization="bounds",
)

BRIDGE = RobotSpec(
    name="bridge",
    cameras=("full_image",),
    image_rotation_degrees=0,
    proprio_dim=7,
    chunk_length=5,
    open_loop_steps=5,
    control_rate_hz=5.0,
)
"""WidowX of BridgeData V2: state and actions are position (3), roll, pitch, yaw (3), gripper, which passes through."""

ROBOTS: dict[str, RobotSpec] = {robot.name: robot for robot in (LIBERO, ALOHA, BRIDGE)}


def get_robot(name: str) -> RobotSpec:
    """The robot of that name. Raises ValueError listing the known ones."""
    if name not in ROBOTS:
        raise ValueError(
            f"unknown robot {name!r}; known: {', '.join(sorted(ROBOTS))}. Add one in prismatic/vla/robots.py"
        )
    return ROBOTS[name]
