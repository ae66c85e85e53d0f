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

    Attributes:
        seeds: one per sample of the next batch, to be mixed with `seed`; None goes on in the stream. With seeds, all
            passes of one look (denoising has several) draw alike.
    """

    needs_noise = False

    def __init__(self, seed: int = 0, multiplicity: Multiplicity = "weighted", min_tokens: int = 0) -> None:
        super().__init__(multiplicity, min_tokens=min_tokens)
        self.seed = seed
        self.seeds: Sequence[int] | None = None
        self._generator = torch.Generator().manual_seed(seed)

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        score_noise: torch.Tensor | None = None,
    ) -> TokenSelection:
        """As `TokenPruner.forward`; raises RuntimeError in training mode."""
        if self.training:
            raise RuntimeError("pruner 'random' is a control for evaluation; train with 'lightvla' or 'none'")
        chosen = super().forward(patches, context, context_mask)
        index = torch.zeros_like(chosen.index)
        for row, number in enumerate(chosen.valid.sum(1).tolist()):
            generator = self._generator
            if self.seeds is not None:
                generator = torch.Generator().manual_seed(self.seeds[row] ^ self.seed)
            draw = torch.randperm(chosen.num_visual, generator=generator)[:number]
            index[row, :number] = draw.sort().values.to(index.device)
        # LightVLA's scores say nothing about what was drawn.
        tokens = gather_tokens(patches, index, chosen.valid)
        return dataclasses.replace(chosen, index=index, tokens=tokens, scores=None)
