"""Learned rival with a fixed number of tokens: points in the image plane, interpolated, in the manner of GridS."""

import torch
from torch import nn

from prismatic.models.pruners.fixed_number import check_number, number_to_keep
from prismatic.models.pruners.grid import spread_over_images
from prismatic.models.pruners.kind import Options, PrunerKind, TrainedPruner, Whole
from prismatic.models.sites import ModelSizes, Projector, Site
from prismatic.models.token_pruner import TokenSelection, rms_normalize

INITIAL_STD = 0.02
WIDTH = 128
"""Of the queries and keys that place the points, D where that is less."""


class GridSampler(TrainedPruner):
    """Places K points in the images and gives the language model what lies there, interpolated.

    In the manner of GridS (arXiv 2605.11817): a small module that looks at the features and the task predicts K
    coordinates, features are sampled there by bilinear interpolation, so that the action loss moves the points, and K
    is fixed, 4 or 16, instead of picked. The paper's abstract is followed, not its code; what is ours:

        u       = mean over the context c of r(c)                           the pooled query: instruction and state
        q_k     = e_k + W_u u                                               one per point, in `WIDTH` dimensions
        a_k     = softmax_j(q_k . W_p r(P_j) / sqrt(WIDTH) - s_k |c_j - anchor_k|^2)     over its image's patches
        point_k = sum_j a_kj c_j                                            c_j: patch centres, one patch apart
        token_k = sum_j hat(x_k - x_j) hat(y_k - y_j) P_j                   hat(t) = max(0, 1 - |t|)

    Points are dealt to the images evenly and anchored on `UniformGrid`'s places; s_k, trained too, holds a point near
    its anchor until the features have something to say. Sampled is behind the projector, where the other pruners prune,
    as a product with the bilinear weights: deterministic in both directions, which `grid_sample` is not on a GPU.

    A sampled token has the position id of the patch nearest to its point, and `kept()` tells these patches: fewer than
    K where points share one. Ids between patches would not do: they run row by row, so half-way between two rows lies
    the middle of a row. The language model always runs over K tokens, each counting once.

    Args:
        number: K, in all images together.
        sizes: of the model.

    Attributes:
        queries: (K, WIDTH) e.
        from_context, from_patches: (WIDTH, D) W_u and W_p.
        closeness: (K,) s, per square patch.
    """

    site: Site = Projector()
    needs_noise = False

    def __init__(self, number: int, sizes: ModelSizes) -> None:
        super().__init__()
        self.grid = sizes.grid
        self.anchors = spread_over_images(number, sizes)
        self.num_visual = sizes.num_visual
        hidden = min(WIDTH, sizes.llm_dim)
        self.queries = nn.Parameter(torch.empty(number, hidden))
        self.from_context = nn.Parameter(torch.empty(hidden, sizes.llm_dim))
        self.from_patches = nn.Parameter(torch.empty(hidden, sizes.llm_dim))
        self.closeness = nn.Parameter(torch.empty(number))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Points near their anchors: keys of variance 1, queries of deviation 0.02, a neighbourhood for each point."""
        dim = self.from_patches.shape[1]
        nn.init.normal_(self.queries, std=INITIAL_STD)
        nn.init.normal_(self.from_context, std=INITIAL_STD * dim**-0.5)
        nn.init.normal_(self.from_patches, std=dim**-0.5)
        # With s = 2 K / V a point's prior weight falls to e^-2 at the side of the square that is its share.
        nn.init.constant_(self.closeness, 2 * len(self.anchors) / self.num_visual)

    def forward(
        self, patches: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None = None
    ) -> TokenSelection:
        """Sample K tokens of (B, V, D) `patches`. Computed in float32 at least, whatever the model computes in."""
        exact = torch.promote_types(patches.dtype, torch.float32)
        with torch.autocast(patches.device.type, enabled=False):
            features = patches.to(exact)
            centres, same_image = self._plane(features)
            points = self.place(features, context.to(exact), context_mask)
            weights = bilinear_weights(points, centres) * same_image
            index = weights.detach().argmax(-1)
            valid = torch.ones_like(index, dtype=torch.bool)
            return TokenSelection(weights @ features, index, valid, valid.to(exact), patches.shape[1])

    def place(self, patches: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None) -> torch.Tensor:
        """Where the points lie, (B, K, 2): down and across, in patches from the first one's centre."""
        mask = torch.ones_like(context[..., 0]) if context_mask is None else context_mask.to(context.dtype)
        pooled = (rms_normalize(context) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        queries = self.queries.to(pooled.dtype) + (pooled @ self.from_context.to(pooled.dtype).T)[:, None]
        keys = rms_normalize(patches) @ self.from_patches.to(pooled.dtype).T
        centres, same_image = self._plane(patches)
        away = (centres[list(self.anchors)][:, None] - centres).square().sum(-1)  # (K, V)
        prior = self.closeness.to(away.dtype)[:, None] * away
        logits = queries @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5 - prior
        return logits.masked_fill(~same_image, float("-inf")).softmax(-1) @ centres

    def _plane(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each visual token its centre (V, 2), and which of them lie in the image of each point (K, V)."""
        height, width = self.grid
        place = torch.arange(self.num_visual, device=patches.device)
        inside, image = place % (height * width), place // (height * width)
        centres = torch.stack([inside // width, inside % width], -1).to(patches.dtype)
        return centres, image[list(self.anchors)][:, None] == image


def bilinear_weights(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(B, K, 2), (V, 2) -> (B, K, V): how much of each token lies at each point, in a plane of patches one apart."""
    return (1 - (points[:, :, None] - centres).abs()).clamp(min=0).prod(-1)


def _build(options: Options, sizes: ModelSizes | None) -> nn.Module:
    assert sizes is not None
    return GridSampler(number_to_keep(options, sizes.num_visual), sizes)


KIND = PrunerKind(
    "grids",
    _build,
    {"tokens": Whole(1)},
    {"tokens": 16},
    parameters=lambda options: (options["tokens"], "sampled points"),
    trainable=True,
    check=check_number,
    tokens=number_to_keep,
)
