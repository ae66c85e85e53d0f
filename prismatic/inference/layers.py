"""ViT blocks and Llama layers as functions over the model's own modules, with kernels that can be chosen.

They compute what timm's `Block` and transformers' `LlamaDecoderLayer` compute at inference, to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.libraries import LlamaModel, VisionTransformer
from prismatic.models.sequence import take_rows
from prismatic.models.vision_backbone import PrismaticVisionBackbone

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Queries (B, H, Q, d), keys and values (B, G, S, d), bias (B, 1, 1, S) or None -> (B, H, Q, d); G divides H."""
Multiply = Callable[[nn.Linear, torch.Tensor], torch.Tensor]
"""A linear layer over its input (..., in) -> (..., out)."""


def attend_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """By torch's fused kernels."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def attend_plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As two matrix products, with the softmax in float32 at least between them."""
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=exact).to(v.dtype) @ v


def multiply_as_torch(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The module as it is."""
    return linear(x)


@dataclass(frozen=True)
class Kernels:
    """Which of several equal computations run.

    Attributes:
        vit_attention, llm_attention: attention in the ViTs and in the language model.
        multiply: linear layers.
        names: what they are called, for people.
    """

    vit_attention: Attend = attend_fused
    llm_attention: Attend = attend_fused
    multiply: Multiply = multiply_as_torch
    names: tuple[tuple[str, str], ...] = (("vit attention", "fused"), ("llm attention", "fused"), ("linear", "torch"))


def vit_block(block: Any, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    """One `Block` of timm over (N, P, dim)."""
    attention = block.attn
    y = kernels.multiply(attention.qkv, block.norm1(x))
    shape = (*x.shape[:2], 3, attention.num_heads, attention.head_dim)
    q, k, v = y.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
    y = kernels.vit_attention(attention.q_norm(q), attention.k_norm(k), v, None)
    y = attention.norm(y.transpose(1, 2).reshape(*x.shape[:2], -1))
    x = x + block.ls1(kernels.multiply(attention.proj, y))
    mlp = block.mlp
    y = mlp.norm(mlp.act(kernels.multiply(mlp.fc1, block.norm2(x))))
    return x + block.ls2(kernels.multiply(mlp.fc2, y))


def see(backbone: PrismaticVisionBackbone, pixel_values: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    """As `PrismaticVisionBackbone.forward`: (B, I * channels, S, S) -> (B, V, feature_dim)."""
    batch = pixel_values.shape[0]
    images = pixel_values.reshape(-1, backbone.channels_per_image, *pixel_values.shape[2:])
    features = [
        _penultimate(vit, channels, kernels)
        for vit, channels in zip(backbone.vits, images.split(3, dim=1), strict=True)
    ]
    return torch.cat(features, dim=-1).reshape(batch, -1, backbone.feature_dim)


def _penultimate(vit: VisionTransformer, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
    for block in vit.blocks[:-1]:
        x = vit_block(block, x, kernels)
    return x[:, vit.num_prefix_tokens :]


def llama_layer(
    layer: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    kernels: Kernels,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """One decoder layer under full attention.

    Args:
        layer: a `LlamaDecoderLayer`.
        hidden: (B, S, D).
        rotary: cosines and sines of the positions, (B, S, d) each.
        bias: (B, 1, 1, S) added to every query's logit of that key, or None.
        kernels: what computes.
        rows: (B, A) the only rows whose result is wanted; None: all. Keys and values come from all rows either way.

    Returns:
        (B, S, D), or (B, A, D).
    """
    attention, mlp, multiply = layer.self_attn, layer.mlp, kernels.multiply
    x = layer.input_layernorm(hidden)
    k = _rotate(_heads(multiply(attention.k_proj, x), attention.head_dim), *rotary)
    v = _heads(multiply(attention.v_proj, x), attention.head_dim)
    if rows is not None:
        x, hidden, rotary = (
            take_rows(x, rows),
            take_rows(hidden, rows),
            (take_rows(rotary[0], rows), take_rows(rotary[1], rows)),
        )
    q = _rotate(_heads(multiply(attention.q_proj, x), attention.head_dim), *rotary)
    y = kernels.llm_attention(q, k, v, bias).transpose(1, 2).reshape(*x.shape[:2], -1)
    hidden = hidden + multiply(attention.o_proj, y)
    x = layer.post_attention_layernorm(hidden)
    return hidden + multiply(mlp.down_proj, mlp.act_fn(multiply(mlp.gate_proj, x)) * multiply(mlp.up_proj, x))


def think(
    model: LlamaModel,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    kernels: Kernels,
    layer: Callable[..., torch.Tensor] = llama_layer,
) -> torch.Tensor:
    """Hidden rows `rows` (B, A) after the final norm, (B, A, D); the last layer computes nothing for other rows.

    Args:
        model: the decoder without the LM head.
        hidden: (B, S, D) embeddings.
        position_ids: (B, S), gaps allowed.
        bias: (B, 1, 1, S) in the dtype of `hidden`, or None where every key counts alike.
        rows: (B, A).
        kernels: what computes.
        layer: runs a layer; `llama_layer` itself, or compiled.
    """
    rotary = model.rotary_emb(hidden, position_ids=position_ids)
    for module in model.layers[:-1]:
        hidden = layer(module, hidden, rotary, bias, kernels)
    return model.norm(layer(model.layers[-1], hidden, rotary, bias, kernels, rows))


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, H, S, d) by the angles of (B, S, d), as `apply_rotary_pos_emb` of transformers does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
