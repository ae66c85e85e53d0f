"""Training-free: the visual tokens that resemble the instruction most, in the manner of SparseVLM."""

import torch
from torch import nn

from prismatic.models.pruners.fixed_number import CHOICES, check_number, number_to_keep, select_best
from prismatic.models.pruners.kind import Options, PrunerKind
from prismatic.models.sites import ModelSizes, Projector, Site
from prismatic.models.token_pruner import TokenSelection, rms_normalize


class TextSimilarity(nn.Module):
    """Keeps the K tokens to which the instruction's tokens are closest.

    After SparseVLM (arXiv 2410.04417, section 3): of the text tokens H_q only those rate that the picture
    brings up,

        S = r(H_v) r(H_q)^T / sqrt(D),   R_t = mean_v softmax_t(S)_vt,   raters = {t : R_t >= mean(R)},

    and a visual token's worth is what the raters give it,

        score_v = mean over raters t of softmax_v(S)_vt.

    The paper scores inside the LLM, by the layers' own attention of raters to visual tokens, prunes layer after layer
    by the rank of that matrix and merges what it drops into a few tokens. Here it happens once, before the LLM, by
    similarity of embeddings alone, K is given and nothing is merged; r, the normalisation that LightVLA uses, is ours.
    The whole prompt counts as text, its template too.

    Args:
        number: K.
    """

    site: Site = Projector()
    needs_noise = False
    needs = ("prompt_mask",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        *,
        prompt_mask: torch.Tensor,
    ) -> TokenSelection:
        """Select tokens of (B, V, D) `patches`; `prompt_mask` (B, C) says which of the context is the prompt."""
        with torch.autocast(patches.device.type, enabled=False):
            return select_best(patches, rate_by_text(patches, context, prompt_mask), self.number)


def rate_by_text(patches: torch.Tensor, context: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
    """(B, V, D), (B, C, D), (B, C) -> (B, V) scores, float32 at least."""
    exact = torch.promote_types(patches.dtype, torch.float32)
    keys, words = rms_normalize(patches.to(exact)), rms_normalize(context.to(exact))
    similarity = keys @ words.transpose(1, 2) * patches.shape[-1] ** -0.5
    brought_up = similarity.masked_fill(~prompt_mask[:, None], float("-inf")).softmax(-1).mean(1)
    worth = brought_up * prompt_mask.sum(1, keepdim=True)  # in means, since R sums to 1
    raters = prompt_mask & (worth >= 1 - 1e-6)
    return (similarity.softmax(1) * raters[:, None]).sum(-1) / raters.sum(1, keepdim=True).clamp(min=1)


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    assert sizes is not None
    return TextSimilarity(number_to_keep(options, sizes.num_visual))


KIND = PrunerKind("text_similarity", _build, CHOICES, check=check_number, tokens=number_to_keep)
