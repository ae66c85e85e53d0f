"""Training-free: tokens as different from each other as possible (DivPrune)."""

import torch
from torch import nn

from prismatic.models.pruners.fixed_number import CHOICES, check_number, number_to_keep, select_index
from prismatic.models.pruners.kind import Options, PrunerKind
from prismatic.models.sites import ModelSizes, Projector, Site
from prismatic.models.token_pruner import TokenSelection


class MostDiverse(nn.Module):
    """Keeps K tokens whose smallest distance from each other is large.

    DivPrune (arXiv 2503.02175, section 3, algorithm 1): the subset S of K tokens that maximises
    min over i != j in S of d(i, j), with the cosine distance d(i, j) = 1 - p_i . p_j / (|p_i| |p_j|), approached
    greedily: first the token whose nearest neighbour is farthest, then time and again the one that is farthest from
    those chosen, argmax_i min over j in S of d(i, j). As in the paper it happens once, behind the projector, over all
    images together, and the instruction plays no part. Duplicates come last, whatever they show.

    Args:
        number: K.
    """

    site: Site = Projector()
    needs_noise = False

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(
        self, patches: torch.Tensor, context: torch.Tensor | None = None, context_mask: torch.Tensor | None = None
    ) -> TokenSelection:
        """Select tokens of (B, V, D) `patches`; the context is ignored."""
        with torch.autocast(patches.device.type, enabled=False):
            return select_index(patches, farthest_first(patches, self.number))


def farthest_first(patches: torch.Tensor, number: int) -> torch.Tensor:
    """(B, V, D) -> (B, number) tokens, ascending, each chosen for its distance from those chosen before."""
    exact = torch.promote_types(patches.dtype, torch.float32)
    directions = torch.nn.functional.normalize(patches.to(exact), dim=-1)
    distance = 1 - directions @ directions.transpose(1, 2)
    distance.diagonal(dim1=1, dim2=2).fill_(float("inf"))  # of a token from itself; so none is its own neighbour
    nearest = distance.amin(2)
    chosen: list[torch.Tensor] = []
    rows = torch.arange(len(patches), device=patches.device)
    for step in range(number):
        best = nearest.argmax(1)
        chosen.append(best)
        to_best = distance[rows, best]
        nearest = to_best if step == 0 else torch.minimum(nearest, to_best)
        nearest = nearest.scatter(1, torch.stack(chosen, 1), float("-inf"))
    return torch.stack(chosen, 1).sort(dim=1).values


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    assert sizes is not None
    return MostDiverse(number_to_keep(options, sizes.num_visual))


KIND = PrunerKind("divprune", _build, CHOICES, check=check_number, tokens=number_to_keep)
