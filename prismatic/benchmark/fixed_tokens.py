"""LightVLA that keeps a given number of tokens, for timing."""

import torch

from prismatic.models.token_pruner import Multiplicity, TokenPruner

FORCING = 1000.0
"""Added to the scores of the picks that are wanted; no score comes near."""


class KeepExactly(TokenPruner):
    """LightVLA with all of its work, but whose queries agree on a given number of tokens, evenly spread."""

    def __init__(
        self, number: int, num_visual: int, device: torch.device, multiplicity: Multiplicity = "weighted"
    ) -> None:
        super().__init__(multiplicity)
        self.forced = forced_picks(number, num_visual, device)
        self.eval()  # for timing actions, in a model that was told so before this came into it

    count = TokenPruner.count  # part of the compiled engine's graphs, as LightVLA itself

    def score(self, patches: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None) -> torch.Tensor:
        """As `TokenPruner.score`, where the wanted picks win."""
        return super().score(patches, context, context_mask) + self.forced


def forced_picks(number: int, num_visual: int, device: torch.device) -> torch.Tensor:
    """(V, V) to add to scores, so that the queries together pick `number` tokens, each about equally often."""
    chosen = torch.arange(number, device=device) * num_visual // number
    forced = torch.zeros(num_visual, num_visual, device=device)
    queries = torch.arange(num_visual, device=device)
    forced[queries, chosen[queries % number]] = FORCING
    return forced
