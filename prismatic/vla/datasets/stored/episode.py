"""One episode of a dataset, however it is stored: small values in memory, pictures read when they are asked for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import numpy as np

from prismatic.vla.datasets.stored.turning import Turn


class UnreadableImage(ValueError):
    """A stored picture that cannot be decoded; the message names its file and place."""


@dataclass(frozen=True)
class Episode(ABC):
    """One episode of T steps.

    Attributes:
        split: `train`, `val`, ... as the dataset says.
        instructions: T sentences; empty where a step has none.
        state: (T, proprio_dim) float32, or None if the dataset has no state or it is not read.
        action: (T, action_dim) float32 as stored, or as the catalogue's `map_episode` makes it; gripper not mapped.
        turns: camera name -> how its stored pictures are turned; those that are not named are taken as they are.
    """

    split: str
    instructions: tuple[str, ...] = field(repr=False)
    state: np.ndarray | None = field(repr=False)
    action: np.ndarray = field(repr=False)
    turns: Mapping[str, Turn] = field(repr=False, default_factory=dict, kw_only=True)

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.action)

    @property
    def instruction(self) -> str:
        """The first sentence that there is."""
        return next(filter(None, self.instructions), "")

    @property
    @abstractmethod
    def cameras(self) -> Set[str]:
        """Names of the cameras that it has pictures of."""

    @abstractmethod
    def decoded(self, camera: str, step: int) -> np.ndarray:
        """(H, W, 3) uint8 as stored. Raises UnreadableImage for a picture that cannot be decoded."""

    @abstractmethod
    def encoded_sizes(self, camera: str) -> np.ndarray | None:
        """(T,) bytes that each picture takes; None where pictures are not stored one by one, as in a video."""

    @abstractmethod
    def image_bytes(self, camera: str, step: int) -> bytes:
        """The stored picture of one camera at one step, where `encoded_sizes` are known."""

    def image(self, camera: str, step: int) -> np.ndarray:
        """(H, W, 3) uint8, turned as the entry says. Raises UnreadableImage for a picture that cannot be decoded."""
        picture = self.decoded(camera, step)
        return self.turns[camera](picture) if camera in self.turns else picture

    def chunk_starts(self, chunk: int) -> np.ndarray:
        """Steps that have a sentence and `chunk` actions from there on, int64; fewer than T, often T - chunk + 1."""
        steps = range(max(self.num_frames - chunk + 1, 0))
        return np.array([step for step in steps if self.instructions[step]], np.int64)
