"""How each named dataset maps to images, state, action and language. One entry per dataset; users register theirs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from prismatic.vla.robots import LIBERO, RobotSpec


def invert_libero_gripper(actions: np.ndarray) -> np.ndarray:
    """(..., 7) actions with the simulator's gripper (-1 open, +1 close) -> a copy with 1 open, 0 closed."""
    mapped = np.array(actions, dtype=np.float32)
    mapped[..., -1] = 1.0 - np.clip(mapped[..., -1], 0.0, 1.0)
    return mapped


def keep_actions(actions: np.ndarray) -> np.ndarray:
    """For datasets whose actions are stored as the policy shall return them."""
    return np.array(actions, dtype=np.float32)


@dataclass(frozen=True)
class DatasetSpec:
    """Where a dataset keeps what a policy needs.

    Attributes:
        name: folder name below the data root.
        robot: the robot that it was recorded with.
        image_keys: camera name of the robot -> feature name of its JPEG images.
        state_key: feature name of the joint state, (T, proprio_dim) floats; None if there is none.
        action_key: feature name of the actions, (T, action_dim) floats.
        language_key: feature name of the instruction.
        map_actions: stored (..., A) actions -> the policy's; maps the gripper to [0, 1] with 1 open.
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
    map_actions: Callable[[np.ndarray], np.ndarray] = invert_libero_gripper

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


LIBERO_SPATIAL = register(DatasetSpec("libero_spatial_no_noops"))
LIBERO_OBJECT = register(DatasetSpec("libero_object_no_noops"))
LIBERO_GOAL = register(DatasetSpec("libero_goal_no_noops"))
LIBERO_10 = register(DatasetSpec("libero_10_no_noops"))


def get_dataset_spec(name: str) -> DatasetSpec:
    """The dataset of that name.

    A name that starts with `libero_` needs no entry: it is read like the published LIBERO datasets. Any other unknown
    name raises ValueError, which lists the known ones.
    """
    if name in CATALOG:
        return CATALOG[name]
    if name.startswith("libero_"):
        return replace(LIBERO_SPATIAL, name=name)
    raise ValueError(
        f"unknown dataset {name!r}; known: {', '.join(sorted(CATALOG))}, and any name that starts with 'libero_' for "
        "data in LIBERO's layout. Make another one known with prismatic.vla.datasets.catalog.register(DatasetSpec(...))"
    )
