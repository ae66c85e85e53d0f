"""All episodes of one dataset, however it is stored, and what is checked about them before they are trained on."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.catalog import DatasetSpec
from prismatic.vla.datasets.stored.episode import Episode
from prismatic.vla.gripper import GRIPPERS, Gripper, unsaid_gripper
from prismatic.vla.robots import LIBERO

logger = logging.getLogger(__name__)

_BYTES_LITERAL = re.compile(r"""b(?P<quote>['"]).*(?P=quote)""", re.DOTALL)


@dataclass(frozen=True)
class DatasetIndex:
    """All episodes of one dataset, `train` and other splits.

    Attributes:
        spec: how the dataset's features map to cameras, state and action.
        directory: the folder of its files.
        episodes: the episodes.
        feature_names: every feature that is stored, known to `spec` or not.
        fingerprint: `sha256:...` of which data these are, wherever they lie.
        odd_images: camera -> what is wrong with the first of its pictures that cannot be decoded.
        files: those that hold the episodes.
        fps: frames per second, where the dataset says it.
        labels: `state` and `action` -> the names that the dataset gives their dimensions, where it does.
    """

    spec: DatasetSpec
    directory: Path
    episodes: Sequence[Episode]
    feature_names: tuple[str, ...]
    fingerprint: str
    odd_images: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    fps: float | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.spec.name

    def numbers_of(self, split: str) -> list[int]:
        """Numbers of the episodes that a split holds."""
        return [number for number, episode in enumerate(self.episodes) if episode.split == split]

    def check_cameras(self, num_images: int) -> tuple[str, ...]:
        """The first `num_images` camera names.

        Raises ValueError if the robot, catalogue or data has fewer, a camera's pictures are stored in a way that is not
        read, or the first one cannot be decoded.
        """
        keys = self.spec.camera_keys(num_images)
        for camera, key in keys.items():
            if camera in self.odd_images:
                raise ValueError(f"dataset {self.name!r}: {self.odd_images[camera]}")
            if any(camera not in episode.cameras for episode in self.episodes):
                raise ValueError(
                    f"dataset {self.name!r} lacks {key!r}, the image of camera {camera!r}, which {num_images} images "
                    f"per sample need; it has {', '.join(self.feature_names)}. Lower num_images_in_input or correct "
                    "the dataset's catalogue entry"
                )
            for episode in [episode for episode in self.episodes if episode.num_frames][:1]:
                episode.image(camera, 0)
        return tuple(keys)

    def with_checked_gripper(self) -> "DatasetIndex":
        """This index, its stored gripper compared with what the catalogue or a flag says of it; logs what was found.

        Where nothing says it, data of LIBERO's robot that go from -1 to +1 are read as the simulator's own actions,
        with a warning.

        Raises ValueError where nothing says it otherwise, or the values cannot be of the convention that was said.
        """
        if not self.spec.has_gripper:
            logger.info("%s: grippers are scaled like joints, and come back as they were stored", self.name)
            return self
        actions = np.concatenate([episode.action for episode in self.episodes])
        spec, own = self.spec, GRIPPERS["libero"]
        if spec.map_actions is unsaid_gripper and spec.robot == LIBERO and own.reaches_both_ends(actions[:, -1]):
            spec = replace(spec, map_actions=own)
            logger.warning(
                "%s: gripper: nothing says how it is stored; it runs from -1 to 1 as the simulator's does, so -1 is "
                "taken for open. Pass --gripper libero if that is right, --gripper width:-1,1 if -1 is closed",
                self.name,
            )  # fmt: skip
        convention = spec.map_actions
        try:
            mapped = convention(actions)[:, -1]
            odd = convention.check(actions[:, -1]) if isinstance(convention, Gripper) else _odd_gripper(mapped)
        except ValueError as error:
            raise ValueError(f"dataset {self.name!r}, robot {spec.robot.name!r}: {error}") from None
        if odd:
            logger.warning("%s: gripper: %s", self.name, odd)
        logger.info(
            "%s: gripper: stored %g to %g, read as %s: %g (closed) to %g (open), open in %.0f %% of the steps",
            self.name, actions[:, -1].min(), actions[:, -1].max(), getattr(convention, "name", "its entry says"),
            mapped.min(), mapped.max(), 100 * (mapped > 0.5).mean(),
        )  # fmt: skip
        return replace(self, spec=spec)


def _odd_gripper(mapped: np.ndarray) -> str | None:
    """What is odd about (N,) values that somebody's own function made; None where they reach 0 and 1."""
    least, most = float(mapped.min()), float(mapped.max())
    if abs(least) <= 0.1 and abs(most - 1) <= 0.1:
        return None
    return f"map_actions makes values from {least:g} to {most:g}, where 0 should be closed and 1 open"


def tell_about_instructions(name: str, episodes: Sequence[Episode], read: int) -> None:
    quoted = (text for episode in episodes for text in episode.instructions if _BYTES_LITERAL.fullmatch(text))
    if (text := next(quoted, None)) is not None:
        logger.warning(
            "%s: sentences such as %r are bytes that were written by str(); write them with .decode()", name, text
        )
    if read > len(episodes):
        logger.warning("%s: %d of %d episodes without an instruction are left out", name, read - len(episodes), read)
    gaps = [sum(not text for text in episode.instructions) for episode in episodes]
    if any(gaps):
        logger.warning(
            "%s: %d frames without an instruction are left out (episodes: %d)", name, sum(gaps), sum(map(bool, gaps))
        )
