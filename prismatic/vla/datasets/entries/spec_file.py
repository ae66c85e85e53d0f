"""A dataset's entry as a YAML file (JSON is YAML, too): robot, features, gripper, without touching the package.

robot:                    # the name of a known one, or the fields of a `RobotSpec`
  name: lab_arm
  cameras: [front, wrist]
  proprio_dim: 7
  action_dim: 7
  action_mask: [true, true, true, true, true, true, false]
image_keys: {front: steps/observation/rgb, wrist: steps/observation/rgb_wrist}
state_key: steps/observation/joints
gripper: open1
rotate_pictures: 180      # or {wrist: 180}: what is stored another way than the policy is to see it
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from prismatic.vla.datasets.catalog import CATALOG, LAYOUTS, DatasetSpec, get_dataset_spec, keep_actions
from prismatic.vla.datasets.stored.turning import QUARTERS, Turn
from prismatic.vla.gripper import Gripper, unsaid_gripper
from prismatic.vla.robots import ROBOTS, Control, NormalizationKind, RobotSpec, get_robot

_TURNING = ("rotate_pictures", "mirror_pictures")
KEYS = ("name", "robot", "image_keys", "state_key", "action_key", "language_key", "gripper", *_TURNING)
_NEEDED = ("name", "cameras", "proprio_dim", "action_dim", "action_mask")
_ROBOT_KEYS = tuple(field.name for field in fields(RobotSpec))
_CONTROL_KEYS = tuple(field.name for field in fields(Control))


@dataclass(frozen=True)
class SpecFile:
    """A file that says how a dataset is read.

    Attributes:
        path: of the file.
        content: what it says as plain values, in an order of its own: comments and the order in the file are no part.
        spec: the entry; without a name where the file gives none.
    """

    path: Path
    content: Mapping[str, Any]
    spec: DatasetSpec

    @classmethod
    def read(cls, path: Path | str) -> "SpecFile":
        """Raises ValueError for a file that cannot be read, for unknown keys, and for values that do not fit."""
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"--dataset_spec {path}: there is no such file") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"--dataset_spec {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(f"--dataset_spec {path} holds no keys with values; known keys are {', '.join(KEYS)}")
        _refuse_unknown(path, content)
        try:
            plain = json.loads(json.dumps(content, sort_keys=True))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--dataset_spec {path} holds a value that is neither text nor number: {error}") from error
        problems: list[str] = []
        spec = _spec(plain, problems)
        if spec is None or problems:
            raise ValueError(f"--dataset_spec {path}: {'; '.join(problems)}")
        return cls(path, plain, spec)

    @property
    def name(self) -> str | None:
        """The dataset that the file is of; None: of any."""
        return self.spec.name or None

    def named(self, name: str, gripper: str | None = None) -> DatasetSpec:
        """The entry under the name of a dataset.

        Raises ValueError where the file is of another one, or both it and the flag say the gripper.
        """
        if self.name not in (None, name):
            raise ValueError(f"--dataset_spec {self.path} is of dataset {self.name!r}, not of {name!r}")
        spec = replace(self.spec, name=name)
        if gripper is None:
            return spec
        if spec.map_actions is not unsaid_gripper:
            raise ValueError(f"--gripper {gripper}: --dataset_spec {self.path} says it; leave one of both out")
        return replace(spec, map_actions=Gripper.parse(gripper))


def read_spec_file(path: Path | None) -> SpecFile | None:
    """The file that a flag names, if it does. Raises ValueError as `SpecFile.read`."""
    return None if path is None else SpecFile.read(path)


def find_dataset_spec(
    name: str, robot: str | None = None, gripper: str | None = None, file: SpecFile | None = None
) -> DatasetSpec:
    """As `get_dataset_spec`, or from a file. Raises ValueError where an entry or `robot` says it, too."""
    if file is None:
        return get_dataset_spec(name, robot, gripper)
    if name in CATALOG:
        raise ValueError(f"--dataset_spec {file.path}: dataset {name!r} has an entry; leave the flag out")
    if robot is not None:
        raise ValueError(f"--robot {robot}: --dataset_spec {file.path} says the robot; leave one of both out")
    return file.named(name, gripper)


def _refuse_unknown(path: Path, content: Mapping[Any, Any]) -> None:
    parts: list[tuple[str, Any, tuple[str, ...]]] = [("", content, KEYS)]
    robot = content.get("robot")
    if isinstance(robot, dict):
        parts += [("robot.", robot, _ROBOT_KEYS), ("robot.control.", robot.get("control"), _CONTROL_KEYS)]
    unknown, known = [], []
    for prefix, part, keys in parts:
        if isinstance(part, dict) and (found := [f"{prefix}{key}" for key in part if key not in keys]):
            unknown += found
            known.append(f"{f'of {prefix[:-1]}: ' if prefix else ''}{', '.join(keys)}")
    if unknown:
        raise ValueError(f"--dataset_spec {path}: unknown keys {', '.join(unknown)}; known are {'; '.join(known)}")


def _spec(content: Mapping[str, Any], problems: list[str]) -> DatasetSpec | None:
    robot = _robot(content.get("robot"), problems)
    for key in ("name", "action_key", "language_key", "gripper", "state_key"):
        if key in content and not _is_word(content[key]) and not (key == "state_key" and content[key] is None):
            problems.append(f"{key} is {content[key]!r}, expected text")
    cameras = content.get("image_keys")
    if robot is not None and (cameras is not None or robot.name not in LAYOUTS):
        _check_cameras(cameras, robot, problems)
    if robot is None or problems:
        return None
    given = {key: content[key] for key in ("image_keys", "state_key", "action_key", "language_key") if key in content}
    given |= {"name": content.get("name", ""), "robot": robot, "turns": _turns(content, robot, problems)}
    spec = replace(LAYOUTS.get(robot.name, DatasetSpec("")), **given)
    gripper = content.get("gripper")
    if not spec.has_gripper:
        if gripper is not None:
            problems.append(
                f"gripper is {gripper!r}, but the robot's action_mask has the last value of an action scaled like the "
                "others; leave the key out, or make the mask's last value false"
            )
        return replace(spec, map_actions=keep_actions)
    if gripper is not None:
        try:
            return replace(spec, map_actions=Gripper.parse(gripper))
        except ValueError as error:
            problems.append(str(error).removeprefix("--"))
    return spec


def _turns(content: Mapping[str, Any], robot: RobotSpec, problems: list[str]) -> dict[str, Turn]:
    """How each camera's pictures are turned; those that are not are left out."""
    rotated, mirrored = (content.get(key, {}) for key in _TURNING)
    degrees = rotated if isinstance(rotated, dict) else dict.fromkeys(robot.cameras, rotated)
    if any(type(value) is not int or value not in QUARTERS for value in degrees.values()):
        problems.append(f"rotate_pictures is {rotated!r}, expected 0, 90, 180 or 270, or one of these for each camera")
    mirror = mirrored if isinstance(mirrored, dict) else dict.fromkeys(robot.cameras, mirrored)
    if any(type(value) is not bool for value in mirror.values()):
        problems.append(f"mirror_pictures is {mirrored!r}, expected true or false, or one of these for each camera")
    if other := [str(camera) for camera in {**degrees, **mirror} if camera not in robot.cameras]:
        told = f"names {', '.join(other)}; the robot's cameras are {', '.join(robot.cameras)}"
        problems.append(f"{' or '.join(_TURNING)} {told}")
    if problems:
        return {}
    turns = {camera: Turn(degrees.get(camera, 0), mirror.get(camera, False)) for camera in robot.cameras}
    return {camera: turn for camera, turn in turns.items() if turn != Turn()}


def _check_cameras(cameras: Any, robot: RobotSpec, problems: list[str]) -> None:
    if not isinstance(cameras, dict) or not cameras or not all(_is_word(feature) for feature in cameras.values()):
        problems.append(
            f"image_keys is {cameras!r}, expected the feature of each camera's pictures, such as "
            f"{{{robot.cameras[0]}: steps/observation/image}}"
        )
    elif other := [camera for camera in cameras if camera not in robot.cameras]:
        problems.append(f"image_keys names {', '.join(other)}; the robot's cameras are {', '.join(robot.cameras)}")


def _robot(given: Any, problems: list[str]) -> RobotSpec | None:
    if isinstance(given, str):
        try:
            return get_robot(given)
        except ValueError:
            problems.append(f"robot is {given!r}, expected {', '.join(ROBOTS)} or the fields of one of your own")
            return None
    if not isinstance(given, dict):
        problems.append(f"robot is {given!r}, expected {', '.join(ROBOTS)} or {', '.join(_NEEDED)} and so on")
        return None
    before = len(problems)
    if missing := [key for key in _NEEDED if key not in given]:
        problems.append(f"robot lacks {', '.join(missing)}")
        return None
    _check_robot(given, problems)
    if len(problems) > before:
        return None
    chunk = given.get("chunk_length", RobotSpec.chunk_length)
    defaults = {"image_rotation_degrees": 0, "open_loop_steps": chunk}  # pictures are taken for upright
    try:
        return RobotSpec.from_json({**defaults, **given})
    except (ValueError, TypeError) as error:
        problems.append(f"robot: {error}")
        return None


def _check_robot(given: Mapping[str, Any], problems: list[str]) -> None:
    """What `RobotSpec` itself takes on trust."""
    chunk, width, cameras = given.get("chunk_length", RobotSpec.chunk_length), given["action_dim"], given["cameras"]
    mask, name = given["action_mask"], given["name"]
    expected = {
        "name": (_is_word(name) and name not in ROBOTS, f"text that is no known robot ({', '.join(ROBOTS)})"),
        "cameras": (_is_list(cameras, str) and 0 < len(cameras) == len({*cameras}), "a list of different names"),
        "state_key": (_is_word(given.get("state_key", "state")), "text"),
        "proprio_dim": (_is_count(given["proprio_dim"]), "a number from 1 on"),
        "action_dim": (_is_count(width), "a number from 1 on"),
        "chunk_length": (_is_count(chunk), "a number from 1 on"),
        "open_loop_steps": (
            _is_count(given.get("open_loop_steps", 1))
            and _is_count(chunk)
            and given.get("open_loop_steps", 1) <= chunk,
            "1 to chunk_length",
        ),
        "action_mask": (_is_list(mask, bool) and len(mask) == width, "true or false for each dimension of an action"),
        "control_rate_hz": (_is_rate(given.get("control_rate_hz", 1)), "a number above 0"),
        "image_rotation_degrees": (given.get("image_rotation_degrees", 0) in (0, 90, 180, 270), "0, 90, 180 or 270"),
        "normalization": (
            given.get("normalization", "bounds_q99") in get_args(NormalizationKind),
            " or ".join(get_args(NormalizationKind)),
        ),
        "canonical_quaternion": (isinstance(given.get("canonical_quaternion", False), bool), "true or false"),
    }
    problems += [
        f"robot.{key} is {given.get(key)!r}, expected {told}" for key, (fits, told) in expected.items() if not fits
    ]
    control = given.get("control")
    if isinstance(control, dict) and _is_count(width):
        for key in ("bounds", "max_change"):
            if not isinstance(control.get(key, []), list) or len(control.get(key, [])) not in (0, width):
                problems.append(
                    f"robot.control.{key} is {control[key]!r}, expected one for each dimension of an action"
                )
        if not _is_list(control.get("grippers", []), int) or any(n >= width for n in control.get("grippers", [])):
            problems.append(
                f"robot.control.grippers is {control['grippers']!r}, expected dimensions of an action, from 0"
            )


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
