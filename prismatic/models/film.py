"""FiLM: the instruction scales and shifts the features of every ViT block (OpenVLA-OFT+, section IV-C; 1709.07871)."""

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from prismatic.libraries import Block
from prismatic.models.vision_backbone import PrismaticVisionBackbone

PUBLISHED_RANK = 32
"""The published loader expects adapters of this rank in the component, its default for `lora_rank`."""

_BLOCK = re.compile(r"(\.blocks\.\d+)\.block\.")
_ADAPTED = re.compile(r"^(.*)\.lora_A\.[^.]+\.weight$")
_ADAPTABLE = re.compile(r"\.(qkv|q|kv|proj|fc1|fc2)\.(weight|bias)$")


class FiLMedBlock(nn.Module):
    """A ViT block whose features are modulated between attention and MLP: x (1 + scale(l)) + shift(l).

    Starts as the block it wraps: both maps are zero.

    Args:
        block: of a ViT of width `dim`.
        dim: of its features.
        llm_dim: width of the language vector l.
    """

    def __init__(self, block: Block, dim: int, llm_dim: int) -> None:
        super().__init__()
        self.block = block
        self.scale = nn.Linear(llm_dim, dim)
        self.shift = nn.Linear(llm_dim, dim)
        for layer in (self.scale, self.shift):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, language: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(N, P, dim) features and (N, llm_dim) language -> (N, P, dim)."""
        block = self.block
        attended = block.attn(block.norm1(x), attn_mask=attn_mask)
        x = x + block.drop_path1(block.ls1(attended))
        language = language.to(self.scale.weight.dtype)
        x = (x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]).to(x.dtype)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def apply_film(backbone: PrismaticVisionBackbone, llm_dim: int) -> None:
    """Wrap every block of every ViT, in place."""
    for vit in backbone.vits:
        reference = next(vit.parameters())
        plain = cast(list[Block], list(vit.blocks))
        blocks = [FiLMedBlock(block, vit.embed_dim, llm_dim) for block in plain]
        vit.blocks = nn.Sequential(*blocks).to(reference.device, reference.dtype)


def has_film(backbone: PrismaticVisionBackbone) -> bool:
    """Whether language modulates the features."""
    return isinstance(backbone.featurizer.blocks[0], FiLMedBlock)


def is_film(name: str) -> bool:
    """Whether a module or parameter of that name is one of FiLM's own maps."""
    return bool({"scale", "shift"} & set(name.split(".")))


def merge_published_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `vision_backbone` component as published -> state dict of a backbone with FiLM.

    Published files prefix every name with `vision_backbone.` and hold adapters beside their base layers; these are
    merged here with scale min(r, 16) / r, into float32: rounding is up to who loads them.
    """
    plain = {name.removeprefix("vision_backbone."): value for name, value in state.items()}
    merged = {name.replace(".base_layer.", "."): value for name, value in plain.items() if ".lora_" not in name}
    for name, down in plain.items():
        if (match := _ADAPTED.match(name)) is None:
            continue
        up = plain[name.replace(".lora_A.", ".lora_B.")].float()
        rank, weight = down.shape[0], merged[f"{match[1]}.weight"]
        delta = (up.flatten(1) @ down.float().flatten(1)).reshape(weight.shape) * (min(rank, 16) / rank)
        merged[f"{match[1]}.weight"] = weight.float() + delta
    return merged


def split_state(
    state: Mapping[str, torch.Tensor], rank: int = PUBLISHED_RANK
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's state dict with FiLM -> what goes into the weight files, and the component in the published form.

    The weight files hold the ViTs under their plain names, as of a checkpoint without FiLM. In the component every
    linear layer and patch convolution stands beside an adapter of `rank` that adds nothing, because the published
    loader expects one.
    """
    weights: dict[str, torch.Tensor] = {}
    component: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not is_film(name):
            weights[_BLOCK.sub(r"\1.", name)] = value
        if not name.startswith("vision_backbone."):
            continue
        if is_film(name) or not _ADAPTABLE.search(name):
            component[name] = value
            continue
        layer, leaf = name.rsplit(".", 1)
        component[f"{layer}.base_layer.{leaf}"] = value
        if leaf == "weight":
            component[f"{layer}.lora_A.default.weight"] = torch.zeros(rank, *value.shape[1:])
            component[f"{layer}.lora_B.default.weight"] = torch.zeros(len(value), rank, *[1] * (value.ndim - 2))
    return weights, component
