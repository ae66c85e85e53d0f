"""How much of every patch is of which class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.looks.classes import BACKGROUND, CLASSES
from prismatic.pictures.overlay import patch_of_pixels

LIES_ON = 0.1
"""A token lies on target or goal where at least this share of its patch's pixels does: what a blanked token showed of
an object must not be seen in its neighbours' rims."""
ALL_BACKGROUND = 0.9
"""And on background only where at least this share does."""


def count_pixels(classes: NDArray[np.uint8], grid: int, center_crop: bool) -> NDArray[np.int64]:
    """Pixels of every class on every patch of one camera's view.

    Args:
        classes: (H, W) class of every pixel of the picture as it is given to the policy.
        grid: G, patches along a side.
        center_crop: whether the policy sees the picture's central part only, over which the patches then lie.

    Returns:
        (G * G, number of classes), row by row.
    """
    height, width = classes.shape
    patches = patch_of_pixels((height, width), grid, center_crop)
    places = patches * len(CLASSES) + classes
    counts = np.bincount(places.ravel(), minlength=(grid * grid + 1) * len(CLASSES))
    return counts.reshape(-1, len(CLASSES))[: grid * grid]


def shares_of(pixels: NDArray[np.integer]) -> NDArray[np.float64]:
    """(..., classes) pixels -> the share of each class on a patch, which sum to 1."""
    return pixels / pixels.sum(axis=-1, keepdims=True)


def lies_on(pixels: NDArray[np.integer], kind: int) -> NDArray[np.bool_]:
    """(V, classes) -> (V,): which tokens are blanked as lying on a class, see `LIES_ON` and `ALL_BACKGROUND`."""
    return shares_of(pixels)[:, kind] >= (ALL_BACKGROUND if kind == BACKGROUND else LIES_ON)
