"""LightVLA* (arXiv 2509.12594, the variant with learnable queries): trained queries pick the tokens that stay."""

import torch
from torch import nn

from prismatic.models.pruners.kind import NOISE, OneOf, Options, PrunerKind, TrainedPruner, Whole
from prismatic.models.sites import LlamaLayer, ModelSizes, Projector, Site, VisionBlock, check_site, site_width
from prismatic.models.token_pruner import Multiplicity, TokenSelection, rms_normalize, select_tokens

INITIAL_STD = 0.02


class LearnableQueries(TrainedPruner):
    """Each of Q trained queries scores all visual tokens at its site and picks one; the union of the picks stays.

    The paper gives the idea and no code. As LightVLA does, score = r(q) r(P)^T / sqrt(D), and in training a pick is a
    straight-through argmax of the noised scores. Which tokens the queries want does not depend on the instruction but
    through the tokens themselves, which inside the language model have seen it.

    A kept token weighs once, however many queries picked it (`multiplicity` is "set", in training and inference). The
    number of queries is a setting here, not one per patch, so how many of them agree says nothing about a token; and
    blocks of a ViT that run over kept tokens then need no weights.

    Args:
        site: where it prunes.
        num_queries: Q, the largest number of tokens that the queries alone can keep.
        dim: width of the tokens at the site.
        min_tokens: fewest tokens that stay; 0: as many as the queries pick.

    Attributes:
        queries: (Q, dim). Only their directions matter, since r removes the length. They start isotropic, so that at
            first the picks are spread over the tokens, and short, so that an optimiser's steps turn them noticeably:
            a step of Adam at a rate of 5e-4 changes a number of deviation 0.02 by a fortieth.
    """

    needs_noise = True
    multiplicity: Multiplicity = "set"

    def __init__(self, site: Site, num_queries: int, dim: int, min_tokens: int = 0) -> None:
        super().__init__()
        self.site = site
        self.min_tokens = min_tokens
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.reset_parameters()

    @property
    def num_queries(self) -> int:
        """Q."""
        return len(self.queries)

    def reset_parameters(self) -> None:
        """New queries, normal with deviation 0.02."""
        nn.init.normal_(self.queries, std=INITIAL_STD)

    def forward(
        self,
        patches: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        score_noise: torch.Tensor | None = None,
    ) -> TokenSelection:
        """Select tokens of (B, V, dim) `patches`; `score_noise` (B, Q, V) is added to the scores in training only.

        The context is ignored. Scores are float32 at least, whatever the model computes in.
        """
        exact = torch.promote_types(patches.dtype, torch.float32)
        with torch.autocast(patches.device.type, enabled=False):
            scores = score_by_queries(self.queries.to(exact), patches.to(exact))
            if self.training and score_noise is not None:
                scores = scores + score_noise
            return select_tokens(patches, scores, self.min_tokens, self.multiplicity, self.training)


def score_by_queries(queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """(Q, D), (B, V, D) -> (B, Q, V): how much each query wants each token."""
    keys = rms_normalize(patches)
    return rms_normalize(queries) @ keys.transpose(1, 2) * patches.shape[-1] ** -0.5


def _site(options: Options) -> Site:
    site, layer = options["site"], options.get("layer")
    if site == "projector":
        if layer is not None:
            raise ValueError(f"pruner option layer={layer}: give the site too, site=vision or site=llama")
        return Projector()
    if layer is None:
        raise ValueError(f"pruner option site={site}: give the layer too, site={site},layer=2")
    return VisionBlock(layer) if site == "vision" else LlamaLayer(layer)


def _check(options: Options, sizes: ModelSizes) -> None:
    check_site(_site(options), sizes)
    if (queries := options["queries"]) > sizes.num_visual:
        raise ValueError(
            f"{queries} queries cannot pick more than the {sizes.num_visual} visual tokens there are; set "
            f"queries={sizes.num_visual} or fewer"
        )


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    assert sizes is not None
    site = _site(options)
    return LearnableQueries(site, options["queries"], site_width(site, sizes), options["min_tokens"])


KIND = PrunerKind(
    "lightvla_star",
    _build,
    {
        "site": OneOf(("projector", "vision", "llama")),
        "layer": Whole(),
        "queries": Whole(1),
        "noise": NOISE,
        "min_tokens": Whole(),
    },
    {"site": "projector", "queries": 128, "min_tokens": 0, "noise": "uniform"},
    site=_site,
    parameters=lambda options: (options["queries"], "queries"),
    trainable=True,
    check=_check,
)
