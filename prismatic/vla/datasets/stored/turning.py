"""Stored pictures that stand another way than the robot's policy is to see them."""

from dataclasses import dataclass

import numpy as np

QUARTERS = (0, 90, 180, 270)


@dataclass(frozen=True)
class Turn:
    """How the pictures of a camera are turned when they are read.

    Attributes:
        degrees: 0, 90, 180 or 270, clockwise.
        mirror: whether left and right are swapped, after that.
    """

    degrees: int = 0
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.degrees not in QUARTERS:
            raise ValueError(f"pictures turned by {self.degrees!r} degrees; expected 0, 90, 180 or 270")

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, 3) -> the same turned, contiguous."""
        turned = np.rot90(picture, -self.degrees // 90)
        return np.ascontiguousarray(turned[:, ::-1] if self.mirror else turned)

    def __str__(self) -> str:
        words = [f"rotated by {self.degrees} degrees clockwise"] if self.degrees else []
        return " and ".join([*words, *(["mirrored"] if self.mirror else [])]) or "as stored"
