"""Which feature of a LeRobot dataset is which camera, state, action and sentence."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prismatic.vla.datasets.catalog import DatasetSpec
from prismatic.vla.datasets.lerobot.layout import INFO, Layout

_ALSO = {"wrist_image": ("image2",), "action": ("actions",)}  # names of the same in published datasets
_TASK = ("steps/language_instruction", "task")


@dataclass(frozen=True)
class Features:
    """Names as the dataset has them.

    Attributes:
        spec: the entry with these names.
        cameras: camera name -> feature of its pictures; those that the dataset has.
        state: feature of the state; None where it has none or it is not read.
        action: feature of the actions.
        language: feature of the sentences, text; None: the tasks of `meta`.
    """

    spec: DatasetSpec
    cameras: Mapping[str, str]
    state: str | None
    action: str
    language: str | None

    @classmethod
    def of(cls, layout: Layout, spec: DatasetSpec, use_state: bool) -> "Features":
        """Find what the entry names, by LeRobot's names or by those of RLDS.

        `steps/observation/image` is `observation.images.image`, `observation.image` or `image`, whichever is there.
        A camera that is not there is left out, and missed when a policy wants it.

        Raises ValueError for a feature that lacks, and for pictures that are none; lists those that are there.
        """
        cameras = {}
        for camera, key in spec.image_keys.items():
            if (name := _find(layout, key)) is not None:
                if name not in layout.camera_features:
                    raise ValueError(
                        f"dataset {spec.name!r}: {name!r} holds {layout.features[name]['dtype']}, and the pictures of "
                        f"camera {camera!r} are expected there; pictures are {_listed(layout.camera_features)}"
                    )
                cameras[camera] = name
        if spec.image_keys and not cameras:
            raise ValueError(
                f"dataset {spec.name!r} lacks {', '.join(map(repr, spec.image_keys.values()))}, the pictures of its "
                f"cameras; pictures are {_listed(layout.camera_features)}. Name them in image_keys of a --dataset_spec"
            )
        needs_state = use_state or spec.map_episode is not None
        state = _required(layout, spec, spec.state_key, "state") if spec.state_key and needs_state else None
        action = _required(layout, spec, spec.action_key, "action")
        language = None if spec.language_key in _TASK else _required(layout, spec, spec.language_key, "language")
        named = replace(
            spec,
            image_keys={**spec.image_keys, **cameras},
            state_key=state or spec.state_key,
            action_key=action,
            language_key=language or "task",
        )
        return cls(named, cameras, state, action, language)

    @property
    def columns(self) -> list[str]:
        """What is read of every frame."""
        return [*filter(None, (self.state, self.language)), self.action, *([] if self.language else ["task_index"])]

    def labels(self, layout: Layout) -> dict[str, tuple[str, ...]]:
        """Names of the dimensions of `state` and `action`, where the dataset has some."""
        found = {"action": layout.labels(self.action), "state": layout.labels(self.state) if self.state else ()}
        return {what: names for what, names in found.items() if names}

    def __str__(self) -> str:
        values = {"state": self.state or "not read", "action": self.action, "instruction": self.language or "task"}
        return ", ".join(f"{what} is {name}" for what, name in {**self.cameras, **values}.items())


def _find(layout: Layout, key: str) -> str | None:
    name = key.rpartition("/")[2]
    names = [name, *_ALSO.get(name, ())]
    tried = [key, *(f"{prefix}{name}" for name in names for prefix in ("observation.images.", "observation.", ""))]
    return next((name for name in tried if name in layout.features), None)


def _required(layout: Layout, spec: DatasetSpec, key: str, what: str) -> str:
    found = _find(layout, key)
    if found is None:
        without = ", or train with --use_proprio False, which does not read it" if what == "state" else ""
        raise ValueError(
            f"dataset {spec.name!r} lacks {key!r}; {layout.folder / INFO} has {_listed(tuple(layout.features))}. Say "
            f"{what}_key in a --dataset_spec{without}"
        )
    return found


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
