"""A dataset's entry as a file: read as an entry in code would be, and refused with all that is known."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from prismatic.vla.datasets.catalog import LAYOUTS, DatasetSpec, keep_actions
from prismatic.vla.datasets.entries.spec_file import SpecFile, find_dataset_spec, read_spec_file
from prismatic.vla.datasets.stored.turning import Turn
from prismatic.vla.gripper import GRIPPERS, Gripper, unsaid_gripper
from prismatic.vla.robots import Control, RobotSpec

OWN = """
robot:
  name: lab_arm
  cameras: [front, wrist]
  proprio_dim: 5
  action_dim: 4
  chunk_length: 6
  action_mask: [true, true, true, false]
  control_rate_hz: 12.5
  control: {kind: delta, grippers: [3], bounds: [[-1, 1], [-1, 1], null, null]}
image_keys: {front: steps/observation/rgb, wrist: steps/observation/rgb_wrist}
state_key: steps/observation/joints
action_key: steps/command
language_key: steps/task
gripper: width:0,0.08
"""


def read(folder: Path, text: str) -> SpecFile:
    path = folder / "my_robot.yaml"
    path.write_text(text)
    return SpecFile.read(path)


def test_a_file_is_what_an_entry_in_code_would_be(tmp_path: Path) -> None:
    robot = RobotSpec(
        name="lab_arm",
        cameras=("front", "wrist"),
        image_rotation_degrees=0,
        proprio_dim=5,
        action_dim=4,
        chunk_length=6,
        open_loop_steps=6,
        control_rate_hz=12.5,
        action_mask=(True, True, True, False),
        control=Control("delta", grippers=(3,), bounds=((-1, 1), (-1, 1), None, None)),
    )
    file = read(tmp_path, OWN)
    assert file.name is None
    assert find_dataset_spec("kitchen", file=file) == DatasetSpec(
        "kitchen",
        robot,
        {"front": "steps/observation/rgb", "wrist": "steps/observation/rgb_wrist"},
        "steps/observation/joints",
        "steps/command",
        "steps/task",
        Gripper.parse("width:0,0.08"),
    )
    assert RobotSpec.from_json(robot.to_json()) == robot, "as a checkpoint stores it"


def test_a_known_robot_brings_its_layout(tmp_path: Path) -> None:
    aloha = read(tmp_path, "name: towels\nrobot: aloha\nstate_key: null\n")
    spec = aloha.named("towels")
    assert spec.image_keys == LAYOUTS["aloha"].image_keys and spec.state_key is None
    assert spec.map_actions is keep_actions
    with pytest.raises(ValueError, match="is of dataset 'towels', not of 'shirts'"):
        aloha.named("shirts")
    cameras = read(tmp_path, '{"robot": "libero", "image_keys": {"full_image": "steps/observation/front"}}')
    spec = cameras.named("kitchen")
    assert dict(spec.image_keys) == {"full_image": "steps/observation/front"} and spec.map_actions is unsaid_gripper
    assert cameras.named("kitchen", "open1").map_actions is GRIPPERS["open1"]


def test_pictures_may_be_turned(tmp_path: Path) -> None:
    spec = read(tmp_path, "{robot: libero, rotate_pictures: 180, mirror_pictures: {wrist_image: true}}").spec
    assert spec.turns == {"full_image": Turn(180), "wrist_image": Turn(180, mirror=True)}
    spec = read(tmp_path, "{robot: libero, rotate_pictures: {full_image: 90, wrist_image: 0}}").spec
    assert spec.turns == {"full_image": Turn(90)}


def test_flags_and_entries_do_not_say_it_again(tmp_path: Path) -> None:
    file = read(tmp_path, OWN)
    with pytest.raises(ValueError, match="--gripper open1: --dataset_spec .*my_robot.yaml says it"):
        find_dataset_spec("kitchen", gripper="open1", file=file)
    with pytest.raises(ValueError, match="--robot libero: --dataset_spec .* says the robot"):
        find_dataset_spec("kitchen", "libero", file=file)
    with pytest.raises(ValueError, match="dataset 'libero_goal_no_noops' has an entry; leave the flag out"):
        find_dataset_spec("libero_goal_no_noops", file=file)
    assert find_dataset_spec("kitchen", "libero", "open1", read_spec_file(None)).robot.name == "libero"


def test_unknown_keys_come_in_one_error_with_the_known_ones(tmp_path: Path) -> None:
    text = OWN.replace("state_key", "states").replace("proprio_dim", "state_dim").replace("kind: delta", "sort: delta")
    with pytest.raises(ValueError) as raised:
        read(tmp_path, text)
    assert str(raised.value).endswith(
        "unknown keys states, robot.state_dim, robot.control.sort; known are "
        "name, robot, image_keys, state_key, action_key, language_key, gripper, rotate_pictures, mirror_pictures; "
        "of robot: name, cameras, "
        "image_rotation_degrees, state_key, proprio_dim, action_dim, chunk_length, open_loop_steps, control_rate_hz, "
        "action_mask, normalization, canonical_quaternion, control; of robot.control: kind, grippers, "
        "gripper_at_rest, bounds, max_change"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (OWN, "[1, 2]", "holds no keys with values; known keys are name, robot"),
        (OWN, "robot: [", "cannot be read as YAML"),
        (OWN, "robot: spot", "robot is 'spot', expected libero, aloha, bridge or the fields"),
        (OWN, "gripper: open1", "robot is None, expected libero"),
        (OWN, "{robot: libero, state_key: 2026-01-01}", "neither text nor number"),
        (OWN, "{robot: libero, gripper: yes}", "gripper is True, expected text"),
        (OWN, "{robot: libero, gripper: up}", "gripper 'up': expected libero"),
        (OWN, "{robot: libero, rotate_pictures: 45}", "rotate_pictures is 45, expected 0, 90, 180 or 270, or one"),
        (
            OWN,
            "{robot: libero, rotate_pictures: {hand: 90}}",
            "names hand; the robot's cameras are full",
        ),
        (OWN, "{robot: libero, mirror_pictures: 1}", "mirror_pictures is 1, expected true or false"),
        (OWN, "{robot: aloha, gripper: open1}", "gripper is 'open1', but the robot's action_mask"),
        ("  proprio_dim: 5\n", "", "robot lacks proprio_dim"),
        ("name: lab_arm", "name: libero", "robot.name is 'libero', expected text that is no known robot"),
        ("[front, wrist]", "[front, front]", "robot.cameras is .*expected a list of different names"),
        ("action_dim: 4", "action_dim: 0", "robot.action_dim is 0, expected a number from 1 on; robot.action_mask"),
        ("action_dim: 4", "action_dim: x", "robot.action_dim is 'x'"),
        ("true, false]", "false]", "robot.action_mask is .* for each dimension of an action"),
        ("chunk_length: 6", "open_loop_steps: 9", "robot.open_loop_steps is 9, expected 1 to chunk_length"),
        ("12.5", "-1", "robot.control_rate_hz is -1, expected a number above 0"),
        ("12.5", "10\n  normalization: mean", "robot.normalization is 'mean', expected bounds_q99 or bounds"),
        ("12.5", "10\n  image_rotation_degrees: 45", "expected 0, 90, 180 or 270"),
        ("null, null]", "null]", "robot.control.bounds is .*one for each dimension"),
        ("grippers: [3]", "grippers: [4]", r"robot.control.grippers is \[4\]"),
        ("[-1, 1], [-1, 1]", "[1, -1], [-1, 1]", "robot: bounds .*expected \\(lowest, highest\\)"),
        ("kind: delta", "kind: jump", "robot: actions of the kind 'jump'"),
        ("wrist: steps", "hand: steps", "image_keys names hand; the robot's cameras are front, wrist"),
        ("image_keys: {front: steps/observation/rgb, wrist: steps/observation/rgb_wrist}\n", "", "image_keys is None"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, OWN.replace(old, new))
    assert "my_robot.yaml" in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.yaml: there is no such file"):
        read_spec_file(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_spec_file(tmp_path)


def test_the_guide_shows_a_file_that_is_one(tmp_path: Path) -> None:
    guides = Path(__file__).resolve().parents[4] / "docs" / "guides"
    (text,) = re.findall(r"```yaml\n(.*?)```", (guides / "own-rlds.md").read_text(), re.DOTALL)
    assert read(tmp_path, text).spec.robot.cameras == ("front", "wrist")
    table = (guides / "robots.md").read_text().partition("| field |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in fields(RobotSpec)}


def test_order_and_comments_are_no_part_of_the_content(tmp_path: Path) -> None:
    one = read(tmp_path, "robot: libero\ngripper: open1\n").content
    other = read(tmp_path, "gripper: open1 # 1 is open\nrobot: libero\n").content
    assert str(one) == str(other)
