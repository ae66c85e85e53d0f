"""Control: as many tokens as LightVLA would keep, chosen at random."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from prismatic.models.pruners.kind import MULTIPLICITY, PrunerKind, Whole
from prismatic.models.token_pruner import Multiplicity, TokenPruner, TokenSelection, gather_tokens


class RandomTokens(TokenPruner):
    """Keeps, per sample, the same number of tokens (and the same weights) as LightVLA, drawn without replacement.

    For evaluation only: shows what the choice itself is worth.

    Args:
        seed: of the draws; one stream per pruner.
        multiplicity, min_tokens: as in `TokenPruner`.
    """

    needs_noise = False
    needs = ("seeds",)

    def __init__(self, seed: int = 0, multiplicity: Multiplicity = "weighted", min_tokens: int = 0) -> None:
        super().__init__(multiplicity, min_tokens=min_tokens)
        self.seed = seed
        self._stream = np.random.default_rng(seed)

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        score_noise: torch.Tensor | None = None,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> TokenSelection:
        """As `TokenPruner.forward`; raises RuntimeError in training mode.

        Args:
            seeds: for each sample the numbers that its draw follows from, beside the pruner's own seed: its policy
                query's and the pass of the LLM, since denoising makes several and each draws anew, as LightVLA picks
                anew. None goes on in the pruner's stream.
        """
        if self.training:
            raise RuntimeError("pruner 'random' is a control for evaluation; train with 'lightvla' or 'none'")
        chosen = super().forward(patches, context, context_mask)
        index = torch.zeros_like(chosen.index)
        for row, number in enumerate(chosen.valid.sum(1).tolist()):
            generator = self._stream if seeds is None else self._seeded(seeds[row])
            draw = np.sort(generator.permutation(chosen.num_visual)[:number])
            index[row, :number] = torch.from_numpy(draw).to(index.device)
        # LightVLA's scores say nothing about what was drawn.
        tokens = gather_tokens(patches, index, chosen.valid)
        return dataclasses.replace(chosen, index=index, tokens=tokens, scores=None)

    def _seeded(self, numbers: Sequence[int]) -> np.random.Generator:
        # A sequence in which each number counts by itself: sums and xors meet, and so do numbers of varying width.
        words = ((int(number) >> shift) % 2**32 for number in (self.seed, *numbers) for shift in (0, 32))
        return np.random.default_rng(list(words))


KIND = PrunerKind(
    "random",
    lambda options, sizes: RandomTokens(options["seed"], options["multiplicity"], options.get("min_tokens", 0)),
    {"seed": Whole(), "multiplicity": MULTIPLICITY, "min_tokens": Whole()},
    {"seed": 0, "multiplicity": "weighted"},
)
