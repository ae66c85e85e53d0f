"""Pruners that keep a number of tokens which their options say: `tokens=K`, or `keep=`, a share of the V there are."""

from collections.abc import Mapping

import torch

from prismatic.models.pruners.kind import Choice, Options, Share, Whole
from prismatic.models.sites import ModelSizes
from prismatic.models.token_pruner import TokenSelection, gather_tokens

CHOICES: Mapping[str, Choice] = {"tokens": Whole(1), "keep": Share()}
KEEP = 0.25
"""The share that stays where neither option is given."""


def number_to_keep(options: Options, num_visual: int) -> int:
    """K. Raises ValueError where it exceeds `num_visual`."""
    if "tokens" not in options:
        return max(1, int(options.get("keep", KEEP) * num_visual + 0.5))
    if (tokens := int(options["tokens"])) > num_visual:
        raise ValueError(
            f"tokens={tokens} is more than the {num_visual} visual tokens there are; set tokens={num_visual} or fewer"
        )
    return tokens


def check_number(options: Options, sizes: ModelSizes) -> None:
    """Raises ValueError as `number_to_keep`."""
    number_to_keep(options, sizes.num_visual)


def select_best(patches: torch.Tensor, scores: torch.Tensor, number: int) -> TokenSelection:
    """The `number` tokens of (B, V, D) with the highest scores (B, V), in token order."""
    index = scores.topk(number, dim=1).indices.sort(dim=1).values
    return select_index(patches, index, scores.float())


def select_index(patches: torch.Tensor, index: torch.Tensor, scores: torch.Tensor | None = None) -> TokenSelection:
    """The tokens of (B, V, D) at `index` (B, K), a set whose members weigh alike."""
    valid = torch.ones_like(index, dtype=torch.bool)
    tokens = gather_tokens(patches, index, valid)
    return TokenSelection(tokens, index, valid, valid.float(), patches.shape[1], scores=scores)
