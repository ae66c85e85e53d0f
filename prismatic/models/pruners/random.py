"""Control: as many tokens as LightVLA would keep, chosen at random."""

import dataclasses
from collections.abc import Sequence

import torch

from prismatic.models.token_pruner import Multiplicity, TokenPruner, TokenSelection, gather_tokens


class RandomTokens(TokenPruner):
    """Keeps, per sample, the same number of tokens (and the same weights) as LightVLA, drawn without replacement.

    For evaluation only: shows what the choice itself is worth.

    Args:
        seed: of the draws; one stream per pruner.
        multiplicity, min_tokens: as in `TokenPruner`.
    """

    needs_noise = False
    needs_seeds = True

    def __init__(self, seed: int = 0, multiplicity: Multiplicity = "weighted", min_tokens: int = 0) -> None:
        super().__init__(multiplicity, min_tokens=min_tokens)
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        score_noise: torch.Tensor | None = None,
        seeds: Sequence[int] | None = None,
    ) -> TokenSelection:
        """As `TokenPruner.forward`; raises RuntimeError in training mode.

        `seeds`, one per sample, are mixed with the pruner's own, so that all passes of one policy query (denoising has
        several) draw alike; None goes on in the pruner's stream.
        """
        if self.training:
            raise RuntimeError("pruner 'random' is a control for evaluation; train with 'lightvla' or 'none'")
        chosen = super().forward(patches, context, context_mask)
        index = torch.zeros_like(chosen.index)
        for row, number in enumerate(chosen.valid.sum(1).tolist()):
            generator = self._generator if seeds is None else self._of_query(seeds[row])
            draw = torch.randperm(chosen.num_visual, generator=generator)[:number]
            index[row, :number] = draw.sort().values.to(index.device)
        # LightVLA's scores say nothing about what was drawn.
        tokens = gather_tokens(patches, index, chosen.valid)
        return dataclasses.replace(chosen, index=index, tokens=tokens, scores=None)

    def _of_query(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed ^ self.seed)
