"""What the pruner kept, over the picture that the policy saw.

The boolean mask (V,) is what `TokenSelection.kept()` gives per sample. Visual tokens are ordered image by image and,
inside an image, row by row over a square grid of patches.
"""

import math

import numpy as np
from numpy.typing import NDArray

from prismatic.pictures.images import Picture
from prismatic.vla.crop import CROP_AREA

OUTLINE = (255, 205, 70)


def kept_grids(kept: NDArray[np.bool_], num_images: int) -> NDArray[np.bool_]:
    """Mask over all visual tokens (V,) -> one square grid per image (I, G, G).

    Raises:
        ValueError: when V is not `num_images` squares.
    """
    kept = np.asarray(kept, dtype=bool).reshape(-1)
    per_image, rest = divmod(kept.size, num_images)
    grid = math.isqrt(per_image)
    if rest or grid * grid != per_image or per_image == 0:
        raise ValueError(f"{kept.size} visual tokens are not {num_images} square grids of patches")
    return kept.reshape(num_images, grid, grid)


def dim_pruned(image: Picture, grid: NDArray[np.bool_], center_crop: bool = False, strength: float = 0.7) -> Picture:
    """The image with every patch darkened and greyed that the pruner dropped.

    Args:
        image: uint8 (H, W, 3), the full camera view.
        grid: bool (G, G), True where the patch was kept.
        center_crop: The policy saw only the central `CROP_AREA` of the image: the grid is laid over that part, and the
            border, which it never saw, counts as dropped.
        strength: 0 leaves pruned patches alone, 1 makes them black.
    """
    seen = _kept_pixels(image, grid, center_crop)
    grey = image.mean(axis=2, keepdims=True)
    dimmed = (1.0 - strength) * (0.5 * image + 0.5 * grey)
    return np.where(seen[..., None], image, dimmed.round()).astype(np.uint8)


def outline_kept(image: Picture, grid: NDArray[np.bool_], center_crop: bool = False) -> Picture:
    """The image with a thin line just inside the border of every area of kept patches, which dark ones need.

    Args:
        image: uint8 (H, W, 3), the full camera view, dimmed or not.
        grid: bool (G, G), True where the patch was kept.
        center_crop: as in `dim_pruned`.
    """
    seen = np.pad(_kept_pixels(image, grid, center_crop), 1)
    inner = seen[1:-1, 1:-1] & seen[:-2, 1:-1] & seen[2:, 1:-1] & seen[1:-1, :-2] & seen[1:-1, 2:]
    edge = seen[1:-1, 1:-1] & ~inner
    return np.where(edge[..., None], np.array(OUTLINE, np.uint8), image).astype(np.uint8)


def _kept_pixels(image: Picture, grid: NDArray[np.bool_], center_crop: bool) -> NDArray[np.bool_]:
    """(H, W): which pixels lie on kept patches."""
    patches = patch_of_pixels((image.shape[0], image.shape[1]), grid.shape[0], center_crop)
    return np.append(grid.reshape(-1), False)[patches]


def patch_of_pixels(shape: tuple[int, int], grid: int, center_crop: bool = False) -> NDArray[np.int64]:
    """Which of the policy's patches every pixel of the full camera view lies on.

    Args:
        shape: (H, W) of the view.
        grid: G, patches along one side.
        center_crop: as in `dim_pruned`.

    Returns:
        (H, W), row by row from 0; G * G for what the policy never saw.
    """
    side = math.sqrt(CROP_AREA) if center_crop else 1.0
    rows, columns = (_patch_of_pixel(pixels, grid, side) for pixels in shape)
    inside = (rows[:, None] < grid) & (columns[None] < grid)
    return np.where(inside, rows[:, None] * grid + columns[None], grid * grid)


def _patch_of_pixel(pixels: int, patches: int, side: float) -> NDArray[np.int64]:
    """For every pixel along one axis the index of its patch; `patches` (one too many) where no patch covers it."""
    position = ((np.arange(pixels) + 0.5) / pixels - 0.5) / side + 0.5
    index = np.floor(position * patches).astype(np.int64)
    return np.where((index >= 0) & (index < patches), index, patches)
