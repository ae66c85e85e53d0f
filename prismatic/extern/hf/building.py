"""From a configuration to the parts that a model is built of, and whether its pruner fits them. Reads no weights."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.models.sites import ModelSizes
from prismatic.models.vision_backbone import PrismaticVisionBackbone

_ALLOCATING = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
_INITIALISING = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}


class NoValues(TorchFunctionMode):
    """What parameters are made of is on the meta device, and nothing is drawn for it.

    Small tables (`arange`) are computed as ever: buffers that no file holds. `torch.device("meta")` would take them
    along, and have torch import its compiler to work out their shapes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALLOCATING and kwargs.get("device") is None:
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__name__", None) in _INITIALISING:
            target = args[0] if args else kwargs["tensor"]  # `torch.nn.init` passes it by name
            if target.is_meta:
                return target
        return func(*args, **kwargs)


def model_sizes(config: OpenVLAConfig, backbone: PrismaticVisionBackbone, num_images: int) -> ModelSizes:
    """What pruners may have to know. The backbone may be on the meta device."""
    return ModelSizes(
        num_images=num_images,
        grid=tuple(backbone.featurizer.patch_embed.grid_size),
        vision_dim=backbone.feature_dim,
        vision_blocks=min(len(vit.blocks) for vit in backbone.vits) - 1,
        llm_dim=config.llama.hidden_size,
        llm_layers=config.llama.num_hidden_layers,
    )


def check_pruner(config: OpenVLAConfig) -> None:
    """Raises ValueError where the recorded pruner does not fit the model. Reads no weights."""
    if not (spec := config.pruner_spec).needs_sizes:
        return
    with NoValues():
        backbone = build_backbone(config)
    spec.check_fits(model_sizes(config, backbone, config.num_images_in_input or 2))


def build_backbone(config: OpenVLAConfig) -> PrismaticVisionBackbone:
    """The vision backbone, untrained. Raises ValueError where the configuration does not say which."""
    if config.timm_model_ids is None or config.image_sizes is None:
        raise ValueError("config.json names no timm_model_ids or image_sizes")
    return PrismaticVisionBackbone(config.timm_model_ids, config.image_sizes[0], config.timm_model_kwargs or ())
