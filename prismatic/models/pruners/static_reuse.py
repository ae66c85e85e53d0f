"""Training-free: visual tokens that hardly changed since the last query keep their keys and values (VLA-Cache)."""

from collections.abc import Sequence

import torch
from torch import nn

from prismatic.models.llama import VisualMemory
from prismatic.models.pruners.fixed_number import CHOICES, check_number, number_to_keep
from prismatic.models.pruners.kind import Options, PrunerKind, Share, Whole
from prismatic.models.sites import LlamaKeys, ModelSizes, Site, check_site
from prismatic.models.token_pruner import TokenSelection, gather_tokens

SIMILARITY = 0.996
"""Above which a token counts as unchanged; VLA-Cache's code asks as much of the pixels of a patch."""


class StaticReuse(nn.Module):
    """Computes anew what changed since the last query of its episode, and what the text attends to; the rest is reused.

    VLA-Cache (arXiv 2502.02175, its static token selection and task-relevance filter): of the V visual tokens

        static    = {v : cos(x_v, x'_v) >= similarity}             x' is what it looked like
        important = the K with the most attention from the text, in the last query
        reused    = static without important

    and in every layer of the language model the keys and values of reused tokens are those of the query before. Nothing
    is dropped: every row that is computed attends to all V tokens. `selection.kept()` tells those computed anew. The
    first query of a session, one with another instruction, and one without a session compute everything, as without a
    pruner.

    What differs from the paper:
    - Its attention is causal, so a visual token's keys do not depend on the text. Here they do, beyond the first layer:
      reused ones also keep what they took from the state, the noisy actions and the other tokens of that query.
    - It compares the pixels of a patch with those of the last frame; here a token, behind the projector, is compared
      with the one that its keys were computed from. So slow changes add up until they are noticed, but a ViT lets
      what moves elsewhere into every token: fewer count as static.
    - Its queries are one control step apart, those here a whole chunk of actions: more has changed.
    - It reuses fewer tokens in layers with spread attention (by entropy); here the set is the same in all layers.
    - Attention is read in the middle layer, averaged over heads and all rows behind the visual tokens.

    A session holds the keys and values of V tokens in all layers: 268 MB at 7B in bfloat16, ten times that where a
    diffusion head makes ten passes, each of which has its own.

    Args:
        number: K.
        similarity: lowest cosine similarity of what is static.
        site: where attention is read.
    """

    needs_noise = False
    needs = ("memories",)

    def __init__(self, number: int, similarity: float, site: LlamaKeys) -> None:
        super().__init__()
        self.number = number
        self.similarity = similarity
        self.site = site

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        *,
        memories: Sequence[VisualMemory | None] | None,
    ) -> TokenSelection:
        """Which of (B, V, D) `patches` are computed anew, given what the last query of each sample's session left."""
        anew = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        for row, memory in enumerate(memories or ()):
            if memory is not None:
                now, before = patches[row].float(), memory.tokens.float()
                anew[row] = torch.cosine_similarity(now, before, dim=-1) < self.similarity
                anew[row, memory.attention.topk(self.number).indices] = True
        return select_mask(patches, anew)


def select_mask(patches: torch.Tensor, mask: torch.Tensor) -> TokenSelection:
    """The tokens of (B, V, D) where `mask` (B, V) is true, in token order, each counting once."""
    index = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, : int(mask.sum(1).max())]
    valid = mask.gather(1, index)
    index = index.masked_fill(~valid, 0)
    return TokenSelection(gather_tokens(patches, index, valid), index, valid, valid.float(), patches.shape[1])


def _site(options: Options) -> Site:
    return LlamaKeys(options.get("layer"))


def _check(options: Options, sizes: ModelSizes) -> None:
    check_site(_site(options), sizes)
    check_number(options, sizes)


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    assert sizes is not None
    number = number_to_keep(options, sizes.num_visual)
    return StaticReuse(number, options["similarity"], LlamaKeys(options.get("layer")))


KIND = PrunerKind(
    "static_reuse",
    _build,
    {**CHOICES, "similarity": Share(), "layer": Whole()},
    {"similarity": SIMILARITY},
    site=_site,
    check=_check,
)
