"""One or two ViTs -> patch features: all images of a batch in one pass, stopping at the block that is used."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prismatic.libraries import VisionTransformer, create_model
from prismatic.models.token_pruner import TokenSelection


class LayerScale(nn.Module):
    """Per-channel scale of a residual branch, stored under its published name `scale_factor`.

    (timm calls the parameter `gamma`, which older transformers renamed while loading.)
    """

    def __init__(self, dim: int, init_value: float = 1e-5) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale (..., dim)."""
        return x * self.scale_factor


def create_vit(timm_id: str, image_size: int, timm_kwargs: dict[str, Any]) -> VisionTransformer:
    """An untrained timm ViT without a classifier, with our `LayerScale` in place of timm's.

    Raises ValueError where timm does not know the id.
    """
    try:
        vit: Any = create_model(timm_id, pretrained=False, num_classes=0, img_size=image_size, **timm_kwargs)
    except RuntimeError as error:
        raise ValueError(f"timm has no model {timm_id!r} (config.json: timm_model_ids): {error}") from error
    for block in vit.blocks:
        for name in ("ls1", "ls2"):
            if hasattr(scale := getattr(block, name), "gamma"):
                setattr(block, name, LayerScale(scale.gamma.shape[0], scale.init_values))
    return vit


@dataclass(frozen=True)
class VisionPruning:
    """Dropping tokens behind a block of the ViTs.

    Attributes:
        block: the last block (0, 1, ...) that sees all patches.
        select: features (B, V, feature_dim) behind that block -> the tokens that stay.
    """

    block: int
    select: Callable[[torch.Tensor], TokenSelection]


class PrismaticVisionBackbone(nn.Module):
    """`featurizer` (DINOv2) and, when fused, `fused_featurizer` (SigLIP) over the same images.

    Args:
        timm_ids: one or two timm model ids.
        image_size: image side in pixels.
        timm_kwargs: per ViT, further arguments of `timm.create_model` (small backbones), or empty.
    """

    def __init__(self, timm_ids: Sequence[str], image_size: int, timm_kwargs: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()
        kwargs = list(timm_kwargs) or [{} for _ in timm_ids]
        self.featurizer = create_vit(timm_ids[0], image_size, kwargs[0])
        self.fused_featurizer = create_vit(timm_ids[1], image_size, kwargs[1]) if len(timm_ids) > 1 else None

    @property
    def vits(self) -> list[VisionTransformer]:
        """The ViTs in channel order."""
        return [self.featurizer] if self.fused_featurizer is None else [self.featurizer, self.fused_featurizer]

    @property
    def feature_dim(self) -> int:
        """Width of one patch's features, all ViTs together."""
        return sum(vit.embed_dim for vit in self.vits)

    @property
    def patches_per_image(self) -> int:
        """Patches of one image."""
        return self.featurizer.patch_embed.num_patches

    @property
    def channels_per_image(self) -> int:
        """Channels that one image takes in `pixel_values`: three per ViT."""
        return 3 * len(self.vits)

    def forward(
        self,
        pixel_values: torch.Tensor,
        language: torch.Tensor | None = None,
        pruning: VisionPruning | None = None,
    ) -> torch.Tensor | TokenSelection:
        """(B, I * channels_per_image, S, S) -> (B, I * patches_per_image, feature_dim).

        Features are those of each ViT's second-to-last block, prefix tokens dropped, without the final norm.
        `language` (B, D) is what blocks with FiLM are modulated by. With `pruning` only the kept tokens' features are
        computed to the end: a selection with tokens (B, K, feature_dim).
        """
        batch = pixel_values.shape[0]
        images = pixel_values.reshape(-1, self.channels_per_image, *pixel_values.shape[2:])
        if language is not None:
            language = language.repeat_interleave(len(images) // batch, dim=0)
        if pruning is not None:
            return self._forward_pruned(images, batch, language, pruning)
        features = [
            _penultimate(vit, channels, language)
            for vit, channels in zip(self.vits, images.split(3, dim=1), strict=True)
        ]
        return torch.cat(features, dim=-1).reshape(batch, -1, self.feature_dim)

    def _forward_pruned(
        self, images: torch.Tensor, batch: int, language: torch.Tensor | None, pruning: VisionPruning
    ) -> TokenSelection:
        behind = pruning.block + 1
        streams = [
            _run_blocks(vit, vit.blocks[:behind], _embed(vit, channels), language)
            for vit, channels in zip(self.vits, images.split(3, dim=1), strict=True)
        ]
        features = [x[:, vit.num_prefix_tokens :] for vit, x in zip(self.vits, streams, strict=True)]
        selection = pruning.select(torch.cat(features, dim=-1).reshape(batch, -1, self.feature_dim))
        packing = pack_by_image(selection, self.patches_per_image)
        kept = packing.pack(selection.tokens).split([vit.embed_dim for vit in self.vits], dim=-1)
        outputs = []
        for vit, x, rows in zip(self.vits, streams, kept, strict=True):
            prefix = x[:, : vit.num_prefix_tokens]
            x = torch.cat([prefix, rows.to(x.dtype)], dim=1)
            mask = packing.attention_mask(vit.num_prefix_tokens)
            x = _run_blocks(vit, vit.blocks[behind:-1], x, language, mask)
            outputs.append(x[:, vit.num_prefix_tokens :])
        return dataclasses.replace(selection, tokens=packing.unpack(torch.cat(outputs, dim=-1)))

    def unused_modules(self) -> list[nn.Module]:
        """Parts that checkpoints hold but the forward pass never runs: last block, final norm, attention pool."""
        parts = [[vit.blocks[-1], vit.norm, vit.attn_pool] for vit in self.vits]
        return [module for group in parts for module in group if module is not None]


def _penultimate(vit: VisionTransformer, x: torch.Tensor, language: torch.Tensor | None) -> torch.Tensor:
    return _run_blocks(vit, vit.blocks[:-1], _embed(vit, x), language)[:, vit.num_prefix_tokens :]


def _embed(vit: VisionTransformer, x: torch.Tensor) -> torch.Tensor:
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))


def _run_blocks(
    vit: VisionTransformer,
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    language: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    checkpointing = vit.grad_checkpointing and vit.training
    inputs = () if language is None else (language,)
    options = {} if mask is None else {"attn_mask": mask}
    for block in blocks:
        run = partial(block, **options)
        x = checkpoint(run, x, *inputs, use_reentrant=False) if checkpointing else run(x, *inputs)
    return x


@dataclass(frozen=True)
class ImagePacking:
    """How a sample's kept tokens are dealt to its images, each padded to M, the most that any image keeps.

    Attributes:
        source: (B, I * M) which of a sample's K tokens stands there, 0 for padding.
        filled: (B, I * M) bool, false for padding.
        place: (B, K) where each of the K tokens stands, 0 where not valid.
        valid: (B, K) bool, as in the selection.
        num_images: I.
    """

    source: torch.Tensor
    filled: torch.Tensor
    place: torch.Tensor
    valid: torch.Tensor
    num_images: int

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, K, F) -> (B * I, M, F), zero for padding."""
        rows = tokens.gather(1, self.source[..., None].expand(-1, -1, tokens.shape[-1])) * self.filled[..., None]
        return rows.reshape(len(tokens) * self.num_images, -1, tokens.shape[-1])

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """(B * I, M, F) -> (B, K, F), zero where not valid."""
        rows = rows.reshape(len(self.place), -1, rows.shape[-1])
        return rows.gather(1, self.place[..., None].expand(-1, -1, rows.shape[-1])) * self.valid[..., None]

    def attention_mask(self, num_prefix: int) -> torch.Tensor:
        """(B * I, 1, 1, num_prefix + M) bool: the keys that every row of an image attends to.

        An image without any key attends to its padding: nothing reads its rows, but they must be finite.
        """
        filled = self.filled.reshape(len(self.filled) * self.num_images, -1)
        keys = torch.cat([filled.new_ones(len(filled), num_prefix), filled], dim=1)
        return (keys | ~keys.any(1, keepdim=True))[:, None, None]


def pack_by_image(selection: TokenSelection, patches_per_image: int) -> ImagePacking:
    """Deal the kept tokens, which are in token order, to their images; an image may get none."""
    index, valid = selection.index, selection.valid
    num_images = selection.num_visual // patches_per_image
    image = index // patches_per_image
    counts = torch.zeros(len(index), num_images, dtype=torch.long, device=index.device)
    counts.scatter_add_(1, image, valid.long())
    first = counts.cumsum(1) - counts  # (B, I) where among the K each image's tokens begin
    width = int(counts.max())
    slots = torch.arange(width, device=index.device)
    filled = (slots < counts[..., None]).flatten(1)
    source = (first[..., None] + slots).flatten(1).masked_fill(~filled, 0)
    place = image * width + torch.arange(index.shape[1], device=index.device) - first.gather(1, image)
    return ImagePacking(source, filled, place.masked_fill(~valid, 0), valid, num_images)
