"""Training-time image augmentation with the semantics of `tf.image`, batched over images, on any device.

Random crop of 0.9 of the area (resized back bilinearly), brightness, contrast, saturation, hue, in this order; values
live in [0, 1] and are clipped after every step, as in the pipeline of published policies.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from prismatic.vla.crop import CROP_AREA
from prismatic.vla.images import crop_and_resize, from_planes, to_planes

BRIGHTNESS = 0.2
CONTRAST = (0.8, 1.2)
SATURATION = (0.8, 1.2)
HUE = 0.05
_CROP_EXTENT = float(np.sqrt(np.float32(CROP_AREA)))


@dataclass(frozen=True)
class AugmentationParameters:
    """One draw per image; every field is (I,) float32.

    Attributes:
        top: first row of the crop, as a fraction of the height, in [0, 1 - sqrt(0.9)].
        left: first column of the crop, as a fraction of the width, same range.
        brightness: added to all values, in [-0.2, 0.2].
        contrast: factor about each channel's mean, in [0.8, 1.2].
        saturation: factor on the saturation, in [0.8, 1.2].
        hue: turn of the hue in full circles, in [-0.05, 0.05].
    """

    top: torch.Tensor
    left: torch.Tensor
    brightness: torch.Tensor
    contrast: torch.Tensor
    saturation: torch.Tensor
    hue: torch.Tensor

    @classmethod
    def draw(cls, rng: np.random.Generator, images: int) -> "AugmentationParameters":
        """Draw for that many images, every operation and every image independently of the others."""
        slack = 1.0 - _CROP_EXTENT
        low = (0.0, 0.0, -BRIGHTNESS, CONTRAST[0], SATURATION[0], -HUE)
        high = (slack, slack, BRIGHTNESS, CONTRAST[1], SATURATION[1], HUE)
        return cls(*torch.from_numpy(rng.uniform(low, high, (images, 6)).astype(np.float32)).unbind(1))


def augment(images: np.ndarray | torch.Tensor, parameters: AugmentationParameters) -> torch.Tensor:
    """Augment (I, H, W, 3) uint8 images; image i by the i-th draw.

    Returns:
        (I, H, W, 3) uint8 on the device of `images`, which is left alone. Raises ValueError on any other dtype or
        shape, or when the number of draws differs from the number of images.
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images must have shape (images, height, width, 3) and dtype uint8, but have shape {tuple(images.shape)} "
            f"and dtype {images.dtype}"
        )
    if len(images) != len(parameters.top):
        raise ValueError(f"{len(images)} images but parameters drawn for {len(parameters.top)}: draw one per image")
    top, left, brightness, contrast, saturation, hue = (
        getattr(parameters, field.name).to(images.device) for field in fields(parameters)
    )
    planes = crop_and_resize(to_planes(images), top, left, _CROP_EXTENT).clamp_(0, 1)
    planes = planes.add_(brightness[:, None, None, None]).clamp_(0, 1)
    mean = planes.mean((2, 3), keepdim=True)
    planes = planes.sub_(mean).mul_(contrast[:, None, None, None]).add_(mean).clamp_(0, 1)
    return from_planes(_saturate_and_turn_hue(planes, saturation[:, None, None], hue[:, None, None]))


def _saturate_and_turn_hue(planes: torch.Tensor, saturation: torch.Tensor, hue: torch.Tensor) -> torch.Tensor:
    """Both colour steps in one pass through hue, chroma and value.

    Clipping between them changes nothing: with the saturation limited to 1, all channels lie in [0, value].

    Args:
        planes: (I, 3, H, W) float32 in [0, 1].
        saturation: (I, 1, 1) factor.
        hue: (I, 1, 1) turn, at most one sixth of a circle.
    """
    red, green, blue = planes.unbind(1)
    value = planes.amax(1)
    chroma = value - planes.amin(1)
    # Hue in sixths of the circle, [0, 6): 0 red, 2 green, 4 blue. Grey pixels have none, and chroma 0 hides it.
    inverse = chroma.clamp_min(1e-12).reciprocal_()
    angle = torch.where(
        value == red,
        (green - blue) * inverse,
        torch.where(value == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4)),
    )
    angle.add_(hue * 6)
    angle = torch.where(angle < 0, angle + 6, angle)  # in [-1.3, 5.3] before
    chroma = torch.minimum(chroma.mul_(saturation), value)  # saturation = chroma / value may not exceed 1
    turned = torch.empty_like(planes)
    torch.sub(angle, 3, out=turned[:, 0]).abs_().sub_(1)
    torch.sub(angle, 2, out=turned[:, 1]).abs_().neg_().add_(2)
    torch.sub(angle, 4, out=turned[:, 2]).abs_().neg_().add_(2)
    return turned.clamp_(0, 1).mul_(chroma[:, None]).add_((value - chroma)[:, None]).clamp_(0, 1)
