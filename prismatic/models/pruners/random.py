"""Control: as many tokens as LightVLA would keep, chosen at random."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from prismatic.models.token_pruner import Multiplicity, TokenPruner, TokenSelection, gather_tokens


class RandomTokens(TokenPruner):
    """Keeps, per sample, the same number of tokens (and the same weights) as LightVLA, drawn without replacement.

    For evaluation only: shows what the choice itself is worth.

    Args:
        seed: of the draws; one stream per pruner.
        multiplicity, min_tokens: as in `TokenPruner`.

    Attributes:
        seeds: one per sample of the next batch; None goes on in the stream. With seeds a draw is a function of
            (`seed`, the sample's seed, how many passes the LLM has made since they were set): denoising makes several,
            and each draws anew, as LightVLA picks anew.
    """

    needs_noise = False

    def __init__(self, seed: int = 0, multiplicity: Multiplicity = "weighted", min_tokens: int = 0) -> None:
        super().__init__(multiplicity, min_tokens=min_tokens)
        self.seed = seed
        self.seeds = None
        self._stream = np.random.default_rng(seed)

    @property
    def seeds(self) -> Sequence[int] | None:
        return self._seeds

    @seeds.setter
    def seeds(self, seeds: Sequence[int] | None) -> None:
        self._seeds, self._passes = seeds, 0

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
            draw = np.sort(self._generator(row).permutation(chosen.num_visual)[:number])
            index[row, :number] = torch.from_numpy(draw).to(index.device)
        self._passes += 1
        # LightVLA's scores say nothing about what was drawn.
        tokens = gather_tokens(patches, index, chosen.valid)
        return dataclasses.replace(chosen, index=index, tokens=tokens, scores=None)

    def _generator(self, row: int) -> np.random.Generator:
        if self._seeds is None:
            return self._stream
        # A sequence of numbers, each of which counts by itself: sums and xors of them meet.
        return np.random.default_rng([self.seed, int(self._seeds[row]) % 2**64, self._passes])
