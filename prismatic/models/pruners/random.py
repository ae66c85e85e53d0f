"""Controls of what LightVLA keeps, drawn at random: as many tokens, others beside its own, all but a tenth of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from prismatic.models.pruners.fixed_number import check_number, select_index
from prismatic.models.pruners.kind import MULTIPLICITY, OneOf, Options, PrunerKind, Whole
from prismatic.models.sites import ModelSizes, Projector, Site
from prismatic.models.token_pruner import Multiplicity, TokenPruner, TokenSelection, gather_tokens, group_counts

INSTEAD, ADDED, DROPPED = "instead", "added", "dropped"
"""What is drawn at random: tokens instead of LightVLA's, tokens beside them, or those of them that go."""


class RandomTokens(TokenPruner):
    """LightVLA's choice, per sample, with chance in it; drawn without replacement, for evaluation only.

    `instead`: as many tokens, with the same weights, anywhere: what the choice itself is worth. The others are the
    paper's two checks (arXiv 2509.12594) of whether the choice is right. `added`: all k that LightVLA keeps and k
    others, as if one query had picked each (all the others, where there are fewer): whether it keeps too little.
    `dropped`: without a tenth of them, see `number_dropped`: whether it keeps too much.

    Args:
        seed: of the draws; one stream per pruner.
        multiplicity, min_tokens: as in `TokenPruner`.
        draw: what is drawn.
    """

    needs_noise = False
    needs = ("seeds",)

    def __init__(
        self, seed: int = 0, multiplicity: Multiplicity = "weighted", min_tokens: int = 0, draw: str = INSTEAD
    ) -> None:
        super().__init__(multiplicity, min_tokens=min_tokens)
        self.draw = draw
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
        own_stream = [self._stream] * len(patches)
        generators = own_stream if seeds is None else [_seeded(self.seed, numbers) for numbers in seeds]
        drawn = _instead(chosen, generators) if self.draw == INSTEAD else _changed(chosen, generators, self.draw)
        # LightVLA's scores say nothing about what was drawn.
        return dataclasses.replace(drawn, tokens=gather_tokens(patches, drawn.index, drawn.valid), scores=None)


def _instead(chosen: TokenSelection, generators: Sequence[np.random.Generator]) -> TokenSelection:
    """As many tokens of each sample, any of them; `tokens` are not theirs yet."""
    index = torch.zeros_like(chosen.index)
    for row, number in enumerate(chosen.valid.sum(1).tolist()):
        draw = np.sort(generators[row].permutation(chosen.num_visual)[:number])
        index[row, :number] = torch.from_numpy(draw).to(index.device)
    return dataclasses.replace(chosen, index=index)


def _changed(chosen: TokenSelection, generators: Sequence[np.random.Generator], draw: str) -> TokenSelection:
    """With others of each sample beside those that were chosen, or without some of them; as `_instead`."""
    counts = torch.zeros(len(chosen.index), chosen.num_visual, device=chosen.count.device, dtype=chosen.count.dtype)
    counts.scatter_add_(1, chosen.index, chosen.count)
    for row, kept in enumerate((counts > 0).cpu().numpy()):
        number = int(kept.sum())
        among, new = (~kept, 1.0) if draw == ADDED else (kept, 0.0)
        take = number if draw == ADDED else number_dropped(number)
        counts[row, generators[row].permutation(np.flatnonzero(among))[:take].tolist()] = new
    index, valid, count = group_counts(counts, int((counts > 0).sum(1).max()))
    return dataclasses.replace(chosen, index=index, valid=valid, count=count)


def number_dropped(kept: int) -> int:
    """A tenth of the kept tokens, to the nearest whole number, at least one; at least one stays."""
    return min(max(1, (kept + 5) // 10), kept - 1)


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


def _site(options: Options) -> Site:
    if "tokens" in options and options["draw"] != INSTEAD:
        raise ValueError(
            f"pruner option draw={options['draw']}: it changes what LightVLA keeps, which tokens={options['tokens']} "
            "does not look at; give one of them"
        )
    return Projector()


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    """Raises ValueError for more tokens than there are."""
    if "tokens" not in options:
        return RandomTokens(options["seed"], options["multiplicity"], options.get("min_tokens", 0), options["draw"])
    if sizes is not None:
        check_number(options, sizes)
    return RandomNumber(options["tokens"], options["seed"])


KIND = PrunerKind(
    "random",
    _build,
    {
        "seed": Whole(),
        "tokens": Whole(1),
        "draw": OneOf((INSTEAD, ADDED, DROPPED)),
        "multiplicity": MULTIPLICITY,
        "min_tokens": Whole(),
    },
    {"seed": 0, "draw": INSTEAD, "multiplicity": "weighted"},
    site=_site,
)
