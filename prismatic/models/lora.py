"""Low-rank adapters: where they go, how they are attached, merged for a checkpoint, and written to a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

ADAPTER = "default"


def unused_modules(model: nn.Module) -> list[nn.Module]:
    """Parts that no action depends on: what the vision backbone never runs, and the language-model head."""
    parts: Any = model
    return [*parts.vision_backbone.unused_modules(), parts.language_model.lm_head]


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the modules that get an adapter: every linear layer and patch convolution that actions depend on."""
    unused = {id(module) for part in unused_modules(model) for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module) not in unused
    ]


def attach_lora(model: nn.Module, rank: int, dropout: float = 0.0) -> LoraConfig:
    """Freeze `model` and put float32 adapters of scale min(rank, 16) / rank beside its layers, in place.

    The adapters start as the identity (Gaussian A, zero B). The model stays the object it was, so its own methods work.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16),
        lora_dropout=dropout,
        target_modules=lora_targets(model),
        init_lora_weights="gaussian",
    )
    inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            # bfloat16 has eight bits: an Adam step of 1e-4 on a weight near 1 would round to nothing.
            parameter.data = parameter.data.float()
    return config


def has_lora(model: nn.Module) -> bool:
    """Whether adapters are attached."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within the block `model` has its plain, published parameter names and its adapters' effect in the weights.

    Merged weights are made on the CPU, layer by layer, so that saving takes no extra device memory. Afterwards the
    adapters and the base weights are back, bit for bit. Without adapters nothing changes.
    """
    layers: list[tuple[str, Any]] = [
        (n, module) for n, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    base_weights: list[torch.Tensor] = []
    try:
        for name, layer in layers:
            base = layer.get_base_layer()
            base_weights.append(base.weight.data)
            delta = layer.get_delta_weight(ADAPTER)
            base.weight.data = (base.weight.data.float() + delta.float()).to(base.weight.dtype).cpu()
            model.set_submodule(name, base)
        yield
    finally:
        for (name, layer), weight in zip(layers, base_weights, strict=False):
            layer.get_base_layer().weight.data = weight
            model.set_submodule(name, layer)


def save_adapter(model: nn.Module, config: LoraConfig, directory: Path, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does for a wrapped model.

    The parameters of a pruner that has some are trained beside the adapters, so they are written with them.

    Args:
        model: with adapters attached.
        config: what `attach_lora` returned.
        directory: made if missing.
        base: path or hub id of the checkpoint that the adapters belong to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    state |= {name: value for name, value in model.state_dict().items() if name.startswith("pruner.")}
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = base
    config.save_pretrained(str(directory))
