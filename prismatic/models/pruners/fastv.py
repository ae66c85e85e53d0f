"""Training-free: the visual tokens that a layer of the language model attended to most (FastV)."""

from collections.abc import Callable

import torch
from torch import nn

from prismatic.models.pruners.fixed_number import CHOICES, check_number, number_to_keep, select_best
from prismatic.models.pruners.kind import Options, PrunerKind, Whole
from prismatic.models.sites import LlamaLayer, ModelSizes, Site, check_site
from prismatic.models.token_pruner import TokenSelection


class FastV(nn.Module):
    """Keeps, from a layer of the language model on, the K visual tokens with the most attention in the layer before.

    FastV (arXiv 2403.06764, section 4): layers before layer k see all tokens; behind layer k - 1 a visual token's worth
    is the attention that it got there,

        score_v = mean over heads h and rows t of softmax(Q_t K^T / sqrt(d))_v,

    and the best K go on. The paper averages over all rows that can see v, and its code takes the last row, which the
    next word is read from. Here attention is full and actions are read from many rows: t runs over everything behind
    the visual tokens (state, prompt, actions, stop; no padding). Rows of visual tokens are left out, which would cost
    V / C times as much. The weights are computed anew from that layer's projections, for these rows, since the fast
    ways of attention give none.

    Args:
        number: K.
        site: before which layer tokens are dropped.
    """

    needs_noise = False
    needs = ("attention",)

    def __init__(self, number: int, site: LlamaLayer) -> None:
        super().__init__()
        self.number = number
        self.site = site

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        *,
        attention: Callable[[], torch.Tensor],
    ) -> TokenSelection:
        """Select hidden rows of visual tokens (B, V, D) by the attention (B, V) that they got."""
        return select_best(patches, attention(), self.number)


def _site(options: Options) -> Site:
    return LlamaLayer(options["layer"])


def _check(options: Options, sizes: ModelSizes) -> None:
    check_site(_site(options), sizes)
    check_number(options, sizes)


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    assert sizes is not None
    return FastV(number_to_keep(options, sizes.num_visual), LlamaLayer(options["layer"]))


KIND = PrunerKind(
    "fastv",
    _build,
    {"layer": Whole(1), **CHOICES},
    {"layer": 2},
    site=_site,
    check=_check,
    tokens=number_to_keep,
)
