"""LightVLA that keeps a given number of tokens, for timing."""

import torch

from prismatic.models.token_pruner import (
    Multiplicity,
    TokenPruner,
    TokenSelection,
    count_picks,
    score_tokens,
    select_tokens,
)

FORCING = 1000.0
"""Added to the scores of the picks that are wanted; no score comes near."""


class KeepExactly(TokenPruner):
    """LightVLA with all of its work, but whose queries agree on a given number of tokens, evenly spread."""

    def __init__(
        self, number: int, num_visual: int, device: torch.device, multiplicity: Multiplicity = "weighted"
    ) -> None:
        super().__init__(multiplicity)
        self.forced = forced_picks(number, num_visual, device)

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        score_noise: torch.Tensor | None = None,
    ) -> TokenSelection:
        """As `TokenPruner.forward` at inference."""
        return select_tokens(patches, self._scores(patches, context, context_mask), multiplicity=self.multiplicity)

    def count(
        self, patches: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `TokenPruner.count`."""
        scores = self._scores(patches, context, context_mask)
        return count_picks(scores), scores.amax(1)

    def _scores(self, patches: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None) -> torch.Tensor:
        return score_tokens(patches.float(), context.float(), context_mask) + self.forced


def forced_picks(number: int, num_visual: int, device: torch.device) -> torch.Tensor:
    """(V, V) to add to scores, so that the queries together pick `number` tokens, each about equally often."""
    chosen = torch.arange(number, device=device) * num_visual // number
    forced = torch.zeros(num_visual, num_visual, device=device)
    queries = torch.arange(num_visual, device=device)
    forced[queries, chosen[queries % number]] = FORCING
    return forced
