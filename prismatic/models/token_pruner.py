"""LightVLA's differentiable token pruner (arXiv 2509.12594, section 3): score, select, keep the union of the picks.

The pruner has no parameters. Every visual token, informed by the instruction and the state, becomes a query; each query
scores all visual tokens and picks one; the distinct picks stay. In training the pick is a straight-through argmax, so
that the action loss teaches the scores which tokens to keep.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.sites import Projector, Site

Multiplicity = Literal["weighted", "set"]


@dataclass
class TokenSelection:
    """Which visual tokens the LLM sees, padded to the batch's largest number.

    Attributes:
        tokens: (B, K, D) embeddings, zero where not valid.
        index: (B, K) which of the V visual tokens each is (ascending), 0 where not valid.
        valid: (B, K) bool.
        count: (B, K) how many queries picked it, 0 where not valid.
        num_visual: V.
        multiplicity: "weighted" lets a token count as often as it was picked, "set" once.
        scores: (B, V) float32, the best score that any query gave each visual token; None in training, and where
            nothing was scored.
        blanked: (B, K) bool, which of them hold no content of their own (`pruners.blanking`); None: all do.
    """

    tokens: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor
    count: torch.Tensor
    num_visual: int
    multiplicity: Multiplicity = "set"
    scores: torch.Tensor | None = None
    blanked: torch.Tensor | None = None

    def kept(self) -> torch.Tensor:
        """(B, V) bool: the tokens that stay."""
        return self._among_all(self.valid)

    def without_content(self) -> torch.Tensor | None:
        """(B, V) bool: the tokens that stay and are blanked; None where nothing was to be."""
        return None if self.blanked is None else self._among_all(self.blanked & self.valid)

    def _among_all(self, which: torch.Tensor) -> torch.Tensor:
        """(B, K) bool of the kept tokens -> (B, V) of all."""
        mask = torch.zeros(len(self.index), self.num_visual, dtype=torch.int32, device=self.index.device)
        return mask.scatter_add_(1, self.index, which.int()) > 0

    def distinct(self) -> torch.Tensor:
        """(B,) number of tokens that stay."""
        return self.kept().sum(1)

    def key_bias(self) -> torch.Tensor:
        """(B, K), float32 at least, to add to attention logits: log(count) when weighted, 0 for a set; else -inf."""
        weighted = self.multiplicity == "weighted"
        count = self.count.to(torch.promote_types(self.tokens.dtype, torch.float32))
        weight = count.clamp(min=1).log() if weighted else torch.zeros_like(count)
        return weight.masked_fill(~self.valid, float("-inf"))


def rms_normalize(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, computed in float32 at least."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def score_tokens(
    patches: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """How much each query wants each visual token (equations 1 and 2).

    Args:
        patches: (B, V, D) visual tokens.
        context: (B, C, D) everything that follows them in the sequence.
        context_mask: (B, C) bool, false for padding; None lets every position take part.

    Returns:
        (B, V, V): row i holds the scores of query i over all tokens.
    """
    scale = patches.shape[-1] ** -0.5
    keys, context_keys = rms_normalize(patches), rms_normalize(context)
    attention = keys @ context_keys.transpose(1, 2) * scale
    if context_mask is not None:
        attention = attention.masked_fill(~context_mask[:, None], float("-inf"))
    queries = rms_normalize(attention.softmax(-1) @ context_keys)
    return queries @ keys.transpose(1, 2) * scale


def pick_tokens(scores: torch.Tensor, min_tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every query picks its best token; below the floor, the best tokens that nobody picked are picked as well.

    Args:
        scores: (B, Q, V).
        min_tokens: least number of distinct picks per sample (V, where there are fewer tokens).

    Returns:
        picks (B, P) token index of each pick, queries (B, P) the query that made it, made (B, P) bool; P is Q plus the
        largest number of further picks. A further pick belongs to the query that scores the token highest.
    """
    batch, num_queries, num_tokens = scores.shape
    picks = scores.argmax(-1)
    queries = torch.arange(num_queries, device=scores.device).expand(batch, -1)
    made = torch.ones_like(picks, dtype=torch.bool)
    if not min_tokens:
        return picks, queries, made
    picked = torch.zeros(batch, num_tokens, dtype=torch.bool, device=scores.device).scatter_(1, picks, True)
    missing = (min(min_tokens, num_tokens) - picked.sum(1)).clamp(min=0)
    best, best_query = scores.detach().max(1)
    further = best.masked_fill(picked, float("-inf")).topk(int(missing.max()), dim=1).indices
    is_made = torch.arange(further.shape[1], device=scores.device) < missing[:, None]
    return (
        torch.cat([picks, further], 1),
        torch.cat([queries, best_query.gather(1, further)], 1),
        torch.cat([made, is_made], 1),
    )


def group_picks(
    picks: torch.Tensor, num_tokens: int, made: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The distinct picks of each sample, in token order.

    Args:
        picks: (B, P) token index of each pick.
        num_tokens: V.
        made: (B, P) bool, false for picks that do not count; None counts all.

    Returns:
        index (B, K), valid (B, K) and count (B, K) as in `TokenSelection`; K is the largest number of distinct picks.
    """
    counts = torch.zeros(len(picks), num_tokens, device=picks.device)
    weight = torch.ones_like(picks, dtype=counts.dtype) if made is None else made.to(counts.dtype)
    counts.scatter_add_(1, picks, weight)
    return group_counts(counts, int((counts > 0).sum(1).max()))


def count_picks(scores: torch.Tensor, min_tokens: int = 0) -> torch.Tensor:
    """(B, Q, V) -> (B, V) float32: how often each token is picked; what `pick_tokens` and `group_picks` find, but no
    shape depends on values, so that it can be captured once and replayed."""
    batch, _, num_tokens = scores.shape
    picks = scores.argmax(-1)
    counts = torch.zeros(batch, num_tokens, device=scores.device)
    counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=counts.dtype))
    if min_tokens:
        picked = counts > 0
        missing = (min(min_tokens, num_tokens) - picked.sum(1, keepdim=True)).clamp(min=0)
        best = scores.amax(1).masked_fill(picked, float("-inf"))
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        counts = torch.where(picked, counts, (rank < missing).to(counts.dtype))
    return counts


def group_counts(counts: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The picked tokens of (B, V) counts in token order, padded to `width`: index, valid and count (B, width) each."""
    index = torch.argsort((counts == 0).to(torch.int8), dim=1, stable=True)[:, :width]
    count = counts.gather(1, index)
    valid = count > 0
    return index.masked_fill(~valid, 0), valid, count


def gather_tokens(patches: torch.Tensor, index: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(B, V, D), (B, K) -> (B, K, D), zero where not valid."""
    return patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1])) * valid[..., None]


def select_tokens(
    patches: torch.Tensor,
    scores: torch.Tensor,
    min_tokens: int = 0,
    multiplicity: Multiplicity = "set",
    straight_through: bool = False,
) -> TokenSelection:
    """Keep the union of what all queries pick, in token order: one row per distinct pick.

    Args:
        patches: (B, V, D).
        scores: (B, Q, V), float32 at least.
        min_tokens: as in `pick_tokens`.
        multiplicity: as in `TokenSelection`.
        straight_through: a row has the gradient of the mean of its group's rows onehot + softmax - stopgrad(softmax)
            (equation 4); its value is the token itself either way. Without it the selection tells its `scores`.
    """
    picks, queries, made = pick_tokens(scores, min_tokens)
    index, valid, count = group_picks(picks, patches.shape[1], made)
    tokens = gather_tokens(patches, index, valid)
    selection = TokenSelection(tokens, index, valid, count, patches.shape[1], multiplicity)
    if straight_through:
        groups = (picks[:, None] == index[..., None]) & valid[..., None] & made[:, None]
        share = groups.to(scores.dtype) / count.clamp(min=1)[..., None].to(scores.dtype)  # (B, K, P)
        mean = share @ pick_softness(scores, queries)
        selection.tokens = tokens + (mean - mean.detach()) @ patches.detach().to(scores.dtype)
    else:
        selection.scores = scores.amax(1).float()
    return selection


def pick_softness(scores: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """(B, Q, V), (B, P) -> (B, P, V): how softly each pick's query wants each token; the stand-in for its gradient."""
    return scores.softmax(-1).gather(1, queries[..., None].expand(-1, -1, scores.shape[-1]))


def keep_all(patches: torch.Tensor) -> TokenSelection:
    """Every one of (B, V, D) tokens."""
    batch, num_tokens, _ = patches.shape
    index = torch.arange(num_tokens, device=patches.device).expand(batch, -1)
    valid = torch.ones_like(index, dtype=torch.bool)
    return TokenSelection(patches, index, valid, valid.float(), num_tokens)


class TokenPruner(nn.Module):
    """LightVLA: keeps the union of what all queries pick.

    Args:
        multiplicity: whether a token picked n times weighs like n tokens ("weighted", as n duplicates do in the
            paper's training) or like one ("set"). Inference must use what training used.
        compact: in training, one row per distinct pick (the mean of its group's straight-through rows) instead of one
            row per query. Equal in loss and gradient when weighted, since duplicates of a token at one position have
            equal hidden states under full attention; about V / K times less work.
        min_tokens: fewest tokens that stay; 0: as many as the queries pick. Not part of the paper.
    """

    needs_noise = True
    site: Site = Projector()

    def __init__(self, multiplicity: Multiplicity = "weighted", compact: bool = True, min_tokens: int = 0) -> None:
        super().__init__()
        self.multiplicity = multiplicity
        self.compact = compact
        self.min_tokens = min_tokens

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        score_noise: torch.Tensor | None = None,
    ) -> TokenSelection:
        """Select tokens of (B, V, D) `patches`; `score_noise` (B, V, V) is added to the scores in training only."""
        with torch.autocast(patches.device.type, enabled=False):
            scores = self.score(patches, context, context_mask)
            if self.training and score_noise is not None:
                scores = scores + score_noise
            if self.training and not self.compact:
                return self._duplicated(patches.to(scores.dtype), scores)
            return select_tokens(patches, scores, self.min_tokens, self.multiplicity, self.training)

    def count(
        self, patches: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """At inference, with fixed shapes: how often each token is picked, and the best score it was given, (B, V)."""
        scores = self.score(patches, context, context_mask)
        return count_picks(scores, self.min_tokens), scores.amax(1).float()

    def score(self, patches: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, V, V) by `score_tokens`, in float32 at least, whatever the model computes in.

        bfloat16 rows tie, and training (autocast) and inference (bfloat16 weights) would pick differently.
        """
        exact = torch.promote_types(patches.dtype, torch.float32)
        return score_tokens(patches.to(exact), context.to(exact), context_mask)

    def _duplicated(self, patches: torch.Tensor, scores: torch.Tensor) -> TokenSelection:
        """One row per pick, duplicates staying, as the paper trains (equation 4)."""
        if self.multiplicity == "set":
            raise ValueError(
                "multiplicity 'set' weighs every kept token once, which duplicated rows cannot: use compact=True"
            )
        picks, queries, made = pick_tokens(scores, self.min_tokens)
        soft = pick_softness(scores, queries)
        rows = F.one_hot(picks, soft.shape[-1]).to(soft.dtype) + soft - soft.detach()
        tokens = (rows @ patches) * made[..., None]
        return TokenSelection(tokens, picks * made, made, made.float(), patches.shape[1], "weighted")


class KeepAllTokens(nn.Module):
    """No pruning (OpenVLA-OFT): every visual token stays."""

    needs_noise = False
    site: Site = Projector()
    multiplicity: Multiplicity = "set"

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
    ) -> TokenSelection:
        """All of (B, V, D) `patches`; the other arguments are ignored."""
        return keep_all(patches)
