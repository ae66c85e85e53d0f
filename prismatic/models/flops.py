"""Exact floating-point operations (two per multiply-add) of one forward pass, by component.

Counts matrix products and convolutions, as `torch.utils.flop_counter` does; norms, activations and softmax count
nothing.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


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


def vision_flops(backbone: Any, num_images: int) -> int:
    """Of the blocks that run: all but the last of each ViT."""
    total = 0
    for vit in backbone.vits:
        convolution = vit.patch_embed.proj
        patches = vit.patch_embed.num_patches
        tokens = patches + vit.num_prefix_tokens
        total += 2 * patches * convolution.weight.numel()
        for block in vit.blocks[:-1]:
            total += 2 * tokens * _linears(block) + 4 * tokens**2 * vit.embed_dim
    return total * num_images


def llm_flops(llama: Any, sequence_length: int) -> int:
    """Of the decoder layers over a sequence with full attention; no LM head."""
    width = llama.config.num_attention_heads * llama.config.head_dim
    attention = 4 * sequence_length**2 * width * llama.config.num_hidden_layers
    return 2 * sequence_length * _linears(llama.layers) + attention


def pruner_flops(num_visual: int, context_length: int, dim: int) -> int:
    """Of scoring: queries from the context, then all pairs of visual tokens."""
    return 4 * num_visual * context_length * dim + 2 * num_visual**2 * dim


def count_flops(
    model: Any,
    action_head: nn.Module | None,
    proprio_projector: nn.Module | None,
    kept_tokens: int | None,
    prompt_tokens: int = 35,
) -> FlopCount:
    """One sample's forward pass.

    Args:
        model: an `OpenVLAForActionPrediction`.
        action_head: its L1 head, or None.
        proprio_projector: or None.
        kept_tokens: visual tokens that reach the LLM; None: all, without a pruner.
        prompt_tokens: BOS, prompt and empty piece.
    """
    visual = model.num_visual_tokens
    context = (prompt_tokens - 1) + model.robot.num_action_tokens + 1 + (proprio_projector is not None)
    kept = visual if kept_tokens is None else kept_tokens
    dim = model.language_model.config.hidden_size
    return FlopCount(
        vision=vision_flops(model.vision_backbone, model.num_images_in_input),
        projector=2 * visual * _linears(model.projector),
        proprio=2 * _linears(proprio_projector) if proprio_projector is not None else 0,
        pruner=0 if kept_tokens is None else pruner_flops(visual, context, dim),
        llm=llm_flops(model.language_model.model, 1 + kept + context),
        action_head=2 * model.robot.chunk_length * _linears(action_head) if action_head is not None else 0,
    )
