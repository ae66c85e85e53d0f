"""Whether an engine answers as the eager one does, on an observation that really came."""

from dataclasses import dataclass

import torch

from prismatic.models.token_pruner import TokenSelection, score_tokens

ACTION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""By dtype, how far normalised actions (-1 to 1) may lie apart in any case; where the model itself spreads rounding
wider, so much more."""
SPREADS = 8
"""How many times as far as one rounding of the pixels moves the eager actions: every layer rounds."""

_STEPS = 16
"""Steps of the dtype that a score may move by, relative to the largest score."""


@dataclass(frozen=True)
class Found:
    """What a comparison found.

    Attributes:
        action_error: largest distance of normalised actions, both computed from the same picks.
        spread: how far rounding the pixels by one more step moves the eager actions; 0 where it was not asked.
        other_picks: picks of queries that differ.
        unexcused: of those, picks that rounding does not explain.
    """

    action_error: float
    spread: float
    other_picks: int
    unexcused: int

    def reason(self, dtype: torch.dtype) -> str | None:
        """What is wrong, in words; None: nothing."""
        if self.unexcused:
            return f"{self.unexcused} queries pick other tokens by more than {dtype}'s resolution"
        tolerance = max(ACTION_TOLERANCE.get(dtype, 1e-9), SPREADS * self.spread)
        if not self.action_error <= tolerance:  # NaN is wrong, too
            return f"normalised actions differ by {self.action_error:.2g}, and {tolerance:.2g} is {dtype}'s spread"
        return None


def compare_picks(ours: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Of scores (B, Q, V) of two engines: picks that differ, and those among them that are no near ties.

    A near tie: the eager scores of both picks lie closer than what rounding in `dtype` moves a score by.
    """
    picks, wanted = ours.argmax(-1, keepdim=True), eager.argmax(-1, keepdim=True)
    margin = eager.gather(-1, wanted) - eager.gather(-1, picks)
    resolution = _STEPS * torch.finfo(dtype).eps * eager.abs().amax()
    return int((picks != wanted).sum()), int((margin > resolution).sum())


def scores_of(patches: torch.Tensor, context: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, V, V) in float32 at least."""
    exact = torch.promote_types(patches.dtype, torch.float32)
    return score_tokens(patches.to(exact), context.to(exact), mask)


def rounded_once_more(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The pixels, each moved by half a step of `dtype` up or down."""
    signs = torch.randint(0, 2, pixels.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return pixels * (1 + torch.finfo(dtype).eps * signs)


def counts_of(selection: TokenSelection) -> torch.Tensor:
    """(B, V): how often each token was picked."""
    counts = torch.zeros(len(selection.index), selection.num_visual, device=selection.index.device)
    return counts.scatter_add_(1, selection.index, selection.count.float() * selection.valid)
