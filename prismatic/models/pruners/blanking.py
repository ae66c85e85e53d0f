"""A control, no pruner: kept tokens whose content is replaced by their picture's mean, while their positions stay.

What a policy still does then it does without what those tokens showed. A mean token, unlike a dropped one, leaves the
number of tokens, their positions and their weights as they were.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prismatic.models.sites import Projector
from prismatic.models.token_pruner import TokenSelection
from prismatic.vla.request import Blanking


def why_not(model: Any) -> str | None:
    """Why the kept tokens of a model cannot be blanked, as a sentence; None: they can."""
    if isinstance(model.site, Projector):
        return None
    return (
        f"pruner {model.config.pruner_spec} drops tokens inside the model, where they cannot be blanked; choose one "
        "with site=projector"
    )


def checked_blankings(
    blankings: Sequence[Blanking | None] | None, number: int, model: Any
) -> Sequence[Blanking | None] | None:
    """One for each of `number` observations; None where none blanks anything.

    Raises ValueError for another number of them or of their tokens, for other kinds, and where the model allows none.
    """
    if blankings is None:
        return None
    wanted = "blankings takes a list with one Blanking(tokens) for each observation, None for none"
    if not isinstance(blankings, list | tuple) or not all(isinstance(one, Blanking | None) for one in blankings):
        raise ValueError(f"{wanted}; it was given {type(blankings).__name__} {blankings!r:.80}")
    if len(blankings) != number:
        raise ValueError(f"{wanted}; {number} observations came with {len(blankings)}")
    given = [blanking for blanking in blankings if blanking is not None]
    if given and (reason := why_not(model)) is not None:
        raise ValueError(reason)
    for blanking in given:
        tokens, seed = np.asarray(blanking.tokens), blanking.others_seed
        if tokens.shape != (model.num_visual_tokens,) or tokens.dtype != bool:
            raise ValueError(
                f"a blanking names tokens by an array of shape {tokens.shape} and type {tokens.dtype}; expected "
                f"({model.num_visual_tokens},), a bool for each visual token"
            )
        if seed is not None and (not isinstance(seed, int) or seed < 0):
            raise ValueError(f"others_seed={seed!r}: expected a whole number from 0 on, or None")
    return blankings if given else None


def blank_tokens(
    selection: TokenSelection, patches: torch.Tensor, blankings: Sequence[Blanking | None], num_images: int
) -> TokenSelection:
    """The selection with the content of some kept tokens replaced by the mean of all tokens of the same picture.

    Args:
        selection: of the B samples; nothing but its tokens changes.
        patches: (B, V, D), what was selected from: image by image, as many tokens of each.
        blankings: one per sample; None leaves a sample as it is.
        num_images: I.
    """
    blanked = torch.zeros_like(selection.valid)
    rows = zip(selection.index.tolist(), selection.valid.tolist(), blankings, strict=True)
    for row, (index, valid, blanking) in enumerate(rows):
        if blanking is not None:
            chosen = _chosen(np.asarray(index), np.asarray(valid, bool), blanking)
            blanked[row] = torch.from_numpy(chosen).to(blanked.device)
    batch, num_visual, width = patches.shape
    means = patches.float().reshape(batch, num_images, -1, width).mean(2).to(selection.tokens.dtype)
    image = selection.index // (num_visual // num_images)
    content = means.gather(1, image[..., None].expand(-1, -1, width))
    tokens = torch.where(blanked[..., None], content, selection.tokens)
    return dataclasses.replace(selection, tokens=tokens, blanked=blanked)


def _chosen(index: np.ndarray, valid: np.ndarray, blanking: Blanking) -> np.ndarray:
    """(K,) bool: which kept tokens of one sample lose their content."""
    named = np.asarray(blanking.tokens, bool)[index] & valid
    if blanking.others_seed is None:
        return named
    others = np.flatnonzero(valid & ~named)
    drawn = np.random.default_rng(blanking.others_seed).permutation(others)[: named.sum()]
    chosen = np.zeros_like(named)
    chosen[drawn] = True
    return chosen
