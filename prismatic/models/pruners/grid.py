"""Control without any look at the picture: a uniform grid of patches in every image."""

import math

import torch
from torch import nn

from prismatic.models.pruners.fixed_number import CHOICES, check_number, number_to_keep, select_index
from prismatic.models.pruners.kind import Options, PrunerKind
from prismatic.models.sites import ModelSizes, Projector, Site
from prismatic.models.token_pruner import TokenSelection


class UniformGrid(nn.Module):
    """Keeps K patches spread evenly over the images, the same ones for every observation.

    Each image gets K / I of them, the first ones one more where that is no whole number. The n of an image of h x w
    patches stand in r = ceil(sqrt(n h / w)) rows (h at most) at the heights floor((i + 1/2) h / r); a row has its share
    m of the n, at floor((j + 1/2) w / m). No parameters, no source: what every other way of choosing has to beat.

    Args:
        number: K, in all images together.
        sizes: of the model.
    """

    site: Site = Projector()
    needs_noise = False

    def __init__(self, number: int, sizes: ModelSizes) -> None:
        super().__init__()
        self.number = number
        self.kept = spread_over_images(number, sizes)

    def forward(
        self, patches: torch.Tensor, context: torch.Tensor | None = None, context_mask: torch.Tensor | None = None
    ) -> TokenSelection:
        """Select tokens of (B, V, D) `patches`; the context is ignored."""
        index = torch.tensor(self.kept, device=patches.device).expand(len(patches), -1)
        return select_index(patches, index)


def spread_over_images(number: int, sizes: ModelSizes) -> tuple[int, ...]:
    """Which of the V visual tokens a grid of `number` patches consists of, ascending."""
    (height, width), kept = sizes.grid, []
    for image, share in enumerate(deal(number, sizes.num_images)):
        kept += [image * height * width + place for place in spread(share, height, width)]
    return tuple(kept)


def deal(number: int, images: int) -> list[int]:
    """`number` things to as many images, as evenly as possible, the first ones first."""
    return [number // images + (image < number % images) for image in range(images)]


def spread(number: int, height: int, width: int) -> list[int]:
    """Places (row by row, ascending) of `number` patches spread evenly over height x width."""
    if not number:
        return []
    rows = min(height, math.ceil(math.sqrt(number * height / width)))
    places = []
    for row, share in enumerate(deal(number, rows)):
        down = (2 * row + 1) * height // (2 * rows)
        places += [down * width + (2 * column + 1) * width // (2 * share) for column in range(share)]
    return places


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    assert sizes is not None
    return UniformGrid(number_to_keep(options, sizes.num_visual), sizes)


KIND = PrunerKind("grid", _build, CHOICES, check=check_number, tokens=number_to_keep)
