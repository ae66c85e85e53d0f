"""Exact floating-point operations (two per multiply-add) of one forward pass, by component.

Counts matrix products and convolutions, as `torch.utils.flop_counter` does; norms, activations and softmax count
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prismatic.models.autoregressive import AutoregressiveActionHead
from prismatic.models.pruners.learnable_queries import LearnableQueries
from prismatic.models.sites import LlamaLayer, Projector, Site, VisionBlock


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations of one sample's forward pass."""

    vision: int
    projector: int
    proprio: int
    pruner: int
    llm: int
    action_head: int

    @property
    def total(self) -> int:
        """All components."""
        return self.vision + self.projector + self.proprio + self.pruner + self.llm + self.action_head

    def to_json(self) -> dict[str, int]:
        """By component, with the total."""
        return {**self.__dict__, "total": self.total}


def _linears(module: nn.Module) -> int:
    """Multiply-adds per token over all linear layers of a module."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def vision_flops(backbone: Any, num_images: int, pruned: tuple[VisionBlock, int] | None = None) -> int:
    """Of the blocks that run: all but the last of each ViT.

    Args:
        backbone: a `PrismaticVisionBackbone`.
        num_images: per sample.
        pruned: behind which block patches are dropped, and how many of an image's run on, padding included.
    """
    total = 0
    for vit in backbone.vits:
        convolution = vit.patch_embed.proj
        patches = vit.patch_embed.num_patches
        total += 2 * patches * convolution.weight.numel()
        for number, block in enumerate(vit.blocks[:-1]):
            rows = patches if pruned is None or number <= pruned[0].block else pruned[1]
            tokens = rows + vit.num_prefix_tokens
            total += 2 * tokens * _linears(block) + 4 * tokens**2 * vit.embed_dim
    return total * num_images


def llm_flops(llama: Any, sequence_length: int, layers: slice = slice(None)) -> int:
    """Of those decoder layers over a sequence with full attention; no LM head."""
    width = llama.config.num_attention_heads * llama.config.head_dim
    chosen = llama.layers[layers]
    return 2 * sequence_length * _linears(chosen) + 4 * sequence_length**2 * width * len(chosen)


def decoding_flops(language_model: Any, prompt_length: int, num_tokens: int) -> int:
    """Of a prompt, then one token at a time over cached keys, with the LM head's logits of each."""
    llama, steps = language_model.model, num_tokens - 1
    width = llama.config.num_attention_heads * llama.config.head_dim * len(llama.layers)
    keys = prompt_length**2 + sum(prompt_length + step for step in range(1, num_tokens))
    linears = (prompt_length + steps) * _linears(llama.layers) + num_tokens * _linears(language_model.lm_head)
    return 2 * linears + 4 * keys * width


def pruner_flops(pruner: nn.Module, num_visual: int, context_length: int, dim: int) -> int:
    """Of scoring: LightVLA makes its queries from the context, one per visual token; learnable ones are there."""
    if isinstance(pruner, LearnableQueries):
        return 2 * num_visual * pruner.queries.numel()
    return 4 * num_visual * context_length * dim + 2 * num_visual**2 * dim


def count_flops(
    model: Any,
    action_head: nn.Module | None,
    proprio_projector: nn.Module | None,
    kept_tokens: int | Sequence[int] | None,
    prompt_tokens: int = 35,
) -> FlopCount:
    """One sample's forward pass, pruned at the site of the model's pruner.

    Args:
        model: an `OpenVLAForActionPrediction`.
        action_head: its L1 head or one that decodes token by token, or None.
        proprio_projector: or None.
        kept_tokens: visual tokens that stay; None: all, without a pruner. A pruner inside the vision backbone needs the
            number of each image, since the images' rows are padded to the longest; a total is taken as evenly spread.
        prompt_tokens: BOS, prompt and empty piece.
    """
    visual, images = model.num_visual_tokens, model.num_images_in_input
    if isinstance(action_head, AutoregressiveActionHead):
        return FlopCount(
            vision=vision_flops(model.vision_backbone, images),
            projector=2 * visual * _linears(model.projector),
            proprio=0,
            pruner=0,
            llm=decoding_flops(model.language_model, visual + prompt_tokens, action_head.action_dim),
            action_head=0,
        )
    context = (prompt_tokens - 1) + model.robot.num_action_tokens + 1 + (proprio_projector is not None)
    site: Site = Projector() if kept_tokens is None else model.site
    per_image = [visual // images] * images if kept_tokens is None else _by_image(kept_tokens, images)
    kept = sum(per_image)
    llama = model.language_model.model
    dropped_at = site.layer if isinstance(site, LlamaLayer) else 0
    projected = kept if isinstance(site, VisionBlock) else visual
    pruned = (site, max(per_image)) if isinstance(site, VisionBlock) else None
    dim = model.language_model.config.hidden_size
    return FlopCount(
        vision=vision_flops(model.vision_backbone, images, pruned),
        projector=2 * projected * _linears(model.projector),
        proprio=2 * _linears(proprio_projector) if proprio_projector is not None else 0,
        pruner=0 if kept_tokens is None else pruner_flops(model.pruner, visual, context, dim),
        llm=llm_flops(llama, 1 + visual + context, slice(dropped_at))
        + llm_flops(llama, 1 + kept + context, slice(dropped_at, None)),
        action_head=2 * model.robot.chunk_length * _linears(action_head) if action_head is not None else 0,
    )


def _by_image(kept_tokens: int | Sequence[int], num_images: int) -> Sequence[int]:
    if not isinstance(kept_tokens, int):
        return kept_tokens
    return [kept_tokens // num_images + (image < kept_tokens % num_images) for image in range(num_images)]
