"""How each named dataset maps to images, state, action and language. One entry per dataset; users register theirs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from prismatic.vla.datasets.stored.turning import Turn
from prismatic.vla.gripper import GRIPPERS, Gripper, unsaid_gripper
from prismatic.vla.robots import ALOHA, BRIDGE, LIBERO, RobotSpec, get_robot


def settled_gripper(gripper: np.ndarray) -> np.ndarray:
    """(T,) gripper positions -> 1 open or 0 closed: a position in between counts as the next one that is neither.

    Positions in between at the very end keep the last value.
    """
    settled = np.array(gripper, dtype=np.float32)
    value = settled[-1] if len(settled) else 0.0
    for step in reversed(range(len(settled))):
        if not 0.05 <= gripper[step] <= 0.95:
            value = np.float32(gripper[step] > 0.95)
        settled[step] = value
    return settled


def bridge_episode(actions: np.ndarray, states: np.ndarray | None) -> tuple[np.ndarray, slice]:
    """BridgeData V2 as OpenVLA reads it: (T, 7) stored actions and states -> actions of steps 1 .. T-2, those steps.

    The first stored action is all zero, so its step goes. An action becomes the way that the arm really went, the
    difference of two states; so the last step, which has no successor, goes as well. The gripper is made 1 or 0.
    """
    if states is None:
        raise ValueError("the actions of BridgeData V2 follow from its states, and there are none")
    movement = np.diff(states[1:, :6], axis=0)
    gripper = settled_gripper(actions[1:, 6])[:-1]
    return np.concatenate([movement, gripper[:, None]], axis=1).astype(np.float32), slice(1, max(len(actions) - 1, 1))


def keep_actions(actions: np.ndarray) -> np.ndarray:
    """For robots that are to be given actions as they are stored, the gripper included."""
    return np.array(actions, dtype=np.float32)


@dataclass(frozen=True)
class DatasetSpec:
    """Where a dataset keeps what a policy needs.

    Attributes:
        name: folder name below the data root.
        robot: the robot that it was recorded with.
        image_keys: camera name of the robot -> feature name of its JPEG or PNG images.
        state_key: feature name of the joint state, (T, proprio_dim) floats, read where the policy is to read it; None
            if there is none.
        action_key: feature name of the actions, (T, action_dim) floats.
        language_key: feature name of the instruction, one for the episode or one per step.
        map_actions: stored (..., A) actions -> the policy's, whose gripper is in [0, 1] with 1 open: a `Gripper`, such
            as `Gripper.parse("open1")`, or a function of one's own. Without one nothing can be trained.
        map_episode: for datasets whose actions follow from more than the stored ones: stored (T, A) actions and (T, P)
            states -> the actions of the steps that stay, before `map_actions`, and which steps those are.
        turns: camera name -> how its stored pictures are turned before anything else sees them; none by default.
    """

    name: str
    robot: RobotSpec = LIBERO
    image_keys: Mapping[str, str] = field(
        default_factory=lambda: {
            "full_image": "steps/observation/image",
            "wrist_image": "steps/observation/wrist_image",
        }
    )
    state_key: str | None = "steps/observation/state"
    action_key: str = "steps/action"
    language_key: str = "steps/language_instruction"
    map_actions: Callable[[np.ndarray], np.ndarray] = unsaid_gripper
    map_episode: Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, slice]] | None = None
    turns: Mapping[str, Turn] = field(default_factory=dict)

    @property
    def has_gripper(self) -> bool:
        """Whether the last value of an action is a gripper that goes to the policy unscaled, so in [0, 1]."""
        return not self.robot.action_mask[-1]

    def camera_keys(self, num_images: int) -> dict[str, str]:
        """Feature names of the first `num_images` cameras of the robot, in order, by camera name.

        Raises ValueError if the robot or the dataset has fewer.
        """
        cameras = self.robot.cameras[:num_images]
        missing = [camera for camera in cameras if camera not in self.image_keys]
        if len(cameras) < num_images or missing or num_images < 1:
            raise ValueError(
                f"dataset {self.name!r} cannot serve {num_images} images per sample: it has "
                f"{[camera for camera in self.robot.cameras if camera in self.image_keys]}; lower num_images_in_input"
            )
        return {camera: self.image_keys[camera] for camera in cameras}


CATALOG: dict[str, DatasetSpec] = {}


def register(spec: DatasetSpec) -> DatasetSpec:
    """Make a dataset known by its name. Registering the same entry twice is allowed, two different ones are not."""
    known = CATALOG.setdefault(spec.name, spec)
    if known != spec:
        raise ValueError(f"a different dataset named {spec.name!r} is registered already; choose another name")
    return spec


for _suite in ("spatial", "object", "goal", "10"):
    register(DatasetSpec(f"libero_{_suite}_no_noops", map_actions=GRIPPERS["libero"]))

LAYOUTS: dict[str, DatasetSpec] = {
    "libero": DatasetSpec("libero"),
    "aloha": DatasetSpec(
        "aloha",
        robot=ALOHA,
        image_keys={
            "full_image": "steps/observation/image",
            "left_wrist_image": "steps/observation/left_wrist_image",
            "right_wrist_image": "steps/observation/right_wrist_image",
        },
        map_actions=keep_actions,
    ),
    "bridge": DatasetSpec("bridge", robot=BRIDGE, image_keys={"full_image": "steps/observation/image_0"}),
}
"""Robot -> how a dataset of that robot is read which has no entry of its own; how it stores the gripper is to be said.

ALOHA's two grippers are scaled like its joints, so actions come back as they were stored, and nothing needs saying.
"""

for _name in (
    "aloha1_fold_shorts_20_demos",
    "aloha1_fold_shirt_30_demos",
    "aloha1_scoop_X_into_bowl_45_demos",
    "aloha1_put_X_into_pot_300_demos",
):  # those of OpenVLA-OFT
    register(replace(LAYOUTS["aloha"], name=_name))
for _name in ("bridge_orig", "bridge_dataset"):  # BridgeData V2 as its authors publish it
    register(
        replace(LAYOUTS["bridge"], name=_name, map_actions=GRIPPERS["open1"], map_episode=bridge_episode),
    )


def is_known(name: str) -> bool:
    """Whether the name alone says how a dataset is read: it has an entry, or begins with `libero_`."""
    return name in CATALOG or name.startswith("libero_")


def get_dataset_spec(name: str, robot: str | None = None, gripper: str | None = None) -> DatasetSpec:
    """The dataset of that name.

    Args:
        name: of the dataset. One that starts with `libero_` needs no entry: it is read like the published LIBERO ones,
            the gripper included.
        robot: key in `ROBOTS`. With an entry of the dataset it must be the entry's; without one it says how the dataset
            is read (`LAYOUTS`).
        gripper: how a dataset without an entry stores the gripper, as `Gripper.parse` takes it.

    Raises ValueError for an unknown robot or gripper, for one that is not the dataset's, and for a dataset of which
    neither an entry nor a robot is known; the message lists those that are.
    """
    if robot is not None and get_robot(robot).name not in LAYOUTS:
        raise ValueError(f"robot {robot!r} has no common layout of datasets; register a DatasetSpec for {name!r}")
    said = None if gripper is None else Gripper.parse(gripper)
    if name in CATALOG:
        spec = CATALOG[name]
        if robot not in (None, spec.robot.name):
            raise ValueError(f"--robot {robot}: dataset {name!r} is of robot {spec.robot.name!r}; leave the flag out")
        if said not in (None, spec.map_actions):
            raise ValueError(f"--gripper {gripper}: dataset {name!r} has an entry that says it; leave the flag out")
        return spec
    if is_known(name) and robot in (None, "libero"):
        spec = replace(LAYOUTS["libero"], name=name, map_actions=GRIPPERS["libero"])
    elif robot is not None:
        spec = replace(LAYOUTS[robot], name=name)
    else:
        raise ValueError(
            f"unknown dataset {name!r}; known: {', '.join(sorted(CATALOG))}, and any name that starts with 'libero_' "
            f"for data in LIBERO's layout. Say --robot ({', '.join(LAYOUTS)}) for data in the layout of another robot, "
            "--dataset_spec with a file that says it for any other, "
            "or make it known with prismatic.vla.datasets.catalog.register(DatasetSpec(...))"
        )
    if said is None:
        return spec
    if not spec.has_gripper:
        raise ValueError(
            f"--gripper {gripper}: robot {spec.robot.name!r} is given its grippers' values as they are stored; leave "
            "the flag out"
        )
    return replace(spec, map_actions=said)
