"""Floating-point operations of one policy query, by component. A multiply-add counts two.

Counts matrix products and convolutions, as `torch.utils.flop_counter` does; norms, activations and softmax count
nothing. Exact for the numbers of tokens that are given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from prismatic.libraries import LlamaForCausalLM, LlamaModel
from prismatic.models.autoregressive import AutoregressiveActionHead
from prismatic.models.contract import ActionHead, ActionModel
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.film import FiLMedBlock
from prismatic.models.pruners.divprune import MostDiverse
from prismatic.models.pruners.fastv import FastV
from prismatic.models.pruners.grid import UniformGrid
from prismatic.models.pruners.grids import GridSampler
from prismatic.models.pruners.learnable_queries import LearnableQueries
from prismatic.models.pruners.random import RandomNumber
from prismatic.models.pruners.static_reuse import StaticReuse
from prismatic.models.pruners.text_similarity import TextSimilarity
from prismatic.models.sites import LlamaKeys, LlamaLayer, Projector, Site, VisionBlock
from prismatic.models.token_pruner import KeepAllTokens
from prismatic.models.vision_backbone import PrismaticVisionBackbone


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations of one observation's action chunk: vision once, then every pass that the head makes.

    Attributes:
        vision: the ViTs with FiLM's maps, where there are such.
        projector: of the visual tokens.
        proprio: of the state.
        pruner: scoring, in every pass where it does not lie inside the vision backbone.
        llm: its layers, in every pass; no LM head.
        action_head: in every pass; a diffusion head's projector of noisy actions; the LM head, where that is the head.
    """

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


def _linears(module: nn.Module | ActionHead) -> int:
    """Multiply-adds per token over all linear layers of a module."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def vision_flops(
    backbone: PrismaticVisionBackbone, num_images: int, pruned: tuple[VisionBlock, int] | None = None
) -> int:
    """Of the blocks that run: all but the last of each ViT.

    Args:
        backbone: with its FiLM, where it has one.
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
            if isinstance(block, FiLMedBlock):
                total += 2 * (_linears(block.scale) + _linears(block.shift))  # of one language vector per image
                block = block.block
            total += 2 * tokens * _linears(block) + 4 * tokens**2 * vit.embed_dim
    return total * num_images


def _attention_width(llama: LlamaModel) -> int:
    heads = llama.config.num_attention_heads
    return heads * (llama.config.head_dim or llama.config.hidden_size // heads)


def llm_flops(llama: LlamaModel, sequence_length: int, layers: slice = slice(None), num_keys: int | None = None) -> int:
    """Of those decoder layers over a sequence with full attention, or attention to as many keys; no LM head."""
    width = _attention_width(llama)
    chosen = llama.layers[layers]
    return 2 * sequence_length * (_linears(chosen) + 2 * (num_keys or sequence_length) * width * len(chosen))


def unread_flops(llama: LlamaModel, sequence_length: int, rows: int) -> int:
    """Of what the last layer computes for all rows but the `rows` that are read: queries, attention, MLP."""
    last = llama.layers[-1]
    linears = _linears(last) - _linears(last.self_attn.k_proj) - _linears(last.self_attn.v_proj)  # type: ignore[union-attr,arg-type]
    unread = sequence_length - rows
    return 2 * unread * linears + 4 * unread * sequence_length * _attention_width(llama)


def decoding_flops(language_model: LlamaForCausalLM, prompt_length: int, num_tokens: int) -> int:
    """Of a prompt, then one token at a time over cached keys, with the LM head's logits of each."""
    llama, steps = language_model.model, num_tokens - 1
    width = _attention_width(llama) * len(llama.layers)
    keys = prompt_length**2 + sum(prompt_length + step for step in range(1, num_tokens))
    linears = (prompt_length + steps) * _linears(llama.layers) + num_tokens * _linears(language_model.lm_head)
    return 2 * linears + 4 * keys * width


def pruner_flops(model: ActionModel, context_length: int) -> int:
    """Of scoring: LightVLA makes its queries from the context, one per visual token; learnable ones are there.

    FastV projects anew what its layer's attention to the visual tokens needs, reuse over time (in a session) only the
    queries; GridS places its points and samples.
    """
    pruner, num_visual, llama = model.pruner, model.num_visual_tokens, model.language_model.model
    dim = llama.config.hidden_size
    if isinstance(pruner, KeepAllTokens | RandomNumber | UniformGrid):
        return 0
    if isinstance(pruner, TextSimilarity):
        return 2 * num_visual * context_length * dim
    if isinstance(pruner, MostDiverse):
        return 2 * num_visual**2 * dim
    if isinstance(pruner, GridSampler):
        points, hidden = pruner.queries.shape
        return 2 * hidden * dim * (1 + num_visual) + 2 * points * num_visual * (hidden + 2 + dim)
    if isinstance(pruner, FastV | StaticReuse):
        rows, attention = 1 + num_visual + context_length, llama.layers[0].self_attn
        keys = rows * _linears(attention.k_proj) if isinstance(pruner, FastV) else 0
        queries = context_length * (_linears(attention.q_proj) + rows * _attention_width(llama))
        return 2 * (keys + queries)
    if isinstance(pruner, LearnableQueries):
        return 2 * num_visual * pruner.queries.numel()
    return 4 * num_visual * context_length * dim + 2 * num_visual**2 * dim


def head_flops(head: ActionHead, model: ActionModel) -> int:
    """Of one pass of an action head: an MLP per action, or the LM head over one row per value of the chunk."""
    rows = model.robot.num_action_tokens
    if head.kind == "discrete":
        return 2 * rows * _linears(model.language_model.lm_head)
    if isinstance(head, DiffusionActionHead):
        mlp, projector = _linears(head.noise_predictor), _linears(head.noisy_action_projector)
        return 2 * model.robot.chunk_length * mlp + 2 * rows * projector
    return 2 * model.robot.chunk_length * _linears(head)


def count_flops(
    model: ActionModel,
    action_head: ActionHead | None,
    proprio_projector: nn.Module | None,
    kept_tokens: int | Sequence[int] | None,
    prompt_tokens: int = 35,
    only_read_rows: bool = False,
) -> FlopCount:
    """One sample's action chunk, pruned at the site of the model's pruner.

    Args:
        model: runs.
        action_head: its head (a diffusion head makes `num_inference_steps` passes, one that decodes token by token as
            many as an action has numbers), or None: one pass without.
        proprio_projector: or None.
        kept_tokens: visual tokens that stay; None: all, without a pruner. The number is taken for every pass: where a
            diffusion head makes several, LightVLA picks anew in each, and a policy tells the last pass's number, so
            that the count is an estimate. A pruner inside the vision
            backbone needs the number of each image, since the images' rows are padded to the longest; a total is taken
            as evenly spread.
        prompt_tokens: BOS, prompt and empty piece.
        only_read_rows: the last layer computes only the rows that the head reads, as the compiled engine does.
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
    diffusion = isinstance(action_head, DiffusionActionHead)
    passes = action_head.num_inference_steps if isinstance(action_head, DiffusionActionHead) else 1
    context = (prompt_tokens - 1) + model.robot.num_action_tokens + 1 + (proprio_projector is not None) + diffusion
    site: Site = Projector() if kept_tokens is None else model.site
    per_image = [visual // images] * images if kept_tokens is None else _by_image(kept_tokens, images)
    # Points that share a nearest patch are tokens of their own.
    pruner = model.pruner
    kept = len(pruner.queries) if isinstance(pruner, GridSampler) and kept_tokens is not None else sum(per_image)
    llama = model.language_model.model
    dropped_at = site.layer if isinstance(site, LlamaLayer) else 0
    projected = kept if isinstance(site, VisionBlock) else visual
    pruned = (site, max(per_image)) if isinstance(site, VisionBlock) else None
    pruner_passes = 1 if isinstance(site, VisionBlock) else passes
    before = llm_flops(llama, 1 + visual + context, slice(dropped_at))
    num_keys = 1 + visual + context if isinstance(site, LlamaKeys) else None
    behind = llm_flops(llama, 1 + kept + context, slice(dropped_at, None), num_keys)
    if only_read_rows:
        behind -= unread_flops(llama, 1 + kept + context, model.robot.num_action_tokens)
    return FlopCount(
        vision=vision_flops(model.vision_backbone, images, pruned),
        projector=2 * projected * _linears(model.projector),
        proprio=2 * _linears(proprio_projector) if proprio_projector is not None else 0,
        pruner=0 if kept_tokens is None else pruner_passes * pruner_flops(model, context),
        llm=passes * (before + behind),
        action_head=passes * head_flops(action_head, model) if action_head is not None else 0,
    )


def _by_image(kept_tokens: int | Sequence[int], num_images: int) -> Sequence[int]:
    if not isinstance(kept_tokens, int):
        return kept_tokens
    return [kept_tokens // num_images + (image < kept_tokens % num_images) for image in range(num_images)]
