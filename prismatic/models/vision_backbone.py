"""One or two ViTs -> patch features: all images of a batch in one pass, stopping at the block that is used."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint


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
        vit: Any = timm.create_model(timm_id, pretrained=False, num_classes=0, img_size=image_size, **timm_kwargs)
    except RuntimeError as error:
        raise ValueError(f"timm has no model {timm_id!r} (config.json: timm_model_ids): {error}") from error
    for block in vit.blocks:
        for name in ("ls1", "ls2"):
            if hasattr(scale := getattr(block, name), "gamma"):
                setattr(block, name, LayerScale(scale.gamma.shape[0], scale.init_values))
    return vit


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

    def forward(self, pixel_values: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """(B, I * channels_per_image, S, S) -> (B, I * patches_per_image, feature_dim).

        Features are those of each ViT's second-to-last block, prefix tokens dropped, without the final norm.
        `language` (B, D) is what blocks with FiLM are modulated by.
        """
        batch = pixel_values.shape[0]
        images = pixel_values.reshape(-1, self.channels_per_image, *pixel_values.shape[2:])
        if language is not None:
            language = language.repeat_interleave(len(images) // batch, dim=0)
        features = [
            _penultimate(vit, channels, language)
            for vit, channels in zip(self.vits, images.split(3, dim=1), strict=True)
        ]
        return torch.cat(features, dim=-1).reshape(batch, -1, self.feature_dim)

    def unused_modules(self) -> list[nn.Module]:
        """Parts that checkpoints hold but the forward pass never runs: last block, final norm, attention pool."""
        parts = [[vit.blocks[-1], vit.norm, vit.attn_pool] for vit in self.vits]
        return [module for group in parts for module in group if module is not None]


def _penultimate(vit: VisionTransformer, x: torch.Tensor, language: torch.Tensor | None) -> torch.Tensor:
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
    inputs = () if language is None else (language,)
    for block in vit.blocks[:-1]:
        if vit.grad_checkpointing and vit.training:
            x = checkpoint(block, x, *inputs, use_reentrant=False)
        else:
            x = block(x, *inputs)
    return x[:, vit.num_prefix_tokens :]
