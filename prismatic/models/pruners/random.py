"""Controls: as many tokens as LightVLA would keep, or a given number, chosen at random."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from prismatic.models.pruners.fixed_number import check_number, select_index
from prismatic.models.pruners.kind import MULTIPLICITY, Options, PrunerKind, Whole
from prismatic.models.sites import ModelSizes, Projector, Site
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
            generator = self._stream if seeds is None else _seeded(self.seed, seeds[row])
            draw = np.sort(generator.permutation(chosen.num_visual)[:number])
            index[row, :number] = torch.from_numpy(draw).to(index.device)
        # LightVLA's scores say nothing about what was drawn.
        tokens = gather_tokens(patches, index, chosen.valid)
        return dataclasses.replace(chosen, index=index, tokens=tokens, scores=None)


class RandomNumber(nn.Module):
    """Keeps K tokens of each sample, drawn without replacement: a set whose members weigh alike. For evaluation only.

    Args:
        number: K, in all images together.
        seed: of the draws; one stream per pruner.
    """

    site: Site = Projector()
    needs_noise = False
    needs = ("seeds",)

    def __init__(self, number: int, seed: int = 0) -> None:
        super().__init__()
        self.number = number
        self.seed = seed
        self._stream = np.random.default_rng(seed)

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> TokenSelection:
        """Select tokens of (B, V, D) `patches`; the context is ignored, `seeds` are as of `RandomTokens`."""
        batch, num_visual = patches.shape[:2]
        generators = [self._stream if seeds is None else _seeded(self.seed, seeds[row]) for row in range(batch)]
        drawn = np.stack([np.sort(generator.permutation(num_visual)[: self.number]) for generator in generators])
        return select_index(patches, torch.from_numpy(drawn).to(patches.device))


def _seeded(seed: int, numbers: Sequence[int]) -> np.random.Generator:
    # A sequence in which each number counts by itself: sums and xors meet, and so do numbers of varying width.
    words = ((int(number) >> shift) % 2**32 for number in (seed, *numbers) for shift in (0, 32))
    return np.random.default_rng(list(words))


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    """Raises ValueError for more tokens than there are."""
    if "tokens" not in options:
        return RandomTokens(options["seed"], options["multiplicity"], options.get("min_tokens", 0))
    if sizes is not None:
        check_number(options, sizes)
    return RandomNumber(options["tokens"], options["seed"])


KIND = PrunerKind(
    "random",
    _build,
    {"seed": Whole(), "tokens": Whole(1), "multiplicity": MULTIPLICITY, "min_tokens": Whole()},
    {"seed": 0, "multiplicity": "weighted"},
)
