"""Low-rank adapters: where they go, how they are attached, merged for a checkpoint, and written to a folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from prismatic.models.film import is_film

ADAPTER = "default"
FOLDER = "lora_adapter"
"""Of a checkpoint: where its adapter lies."""
PREFIX = "base_model.model."
"""Of every tensor in an adapter file, as PEFT names a wrapped model's."""
FINGERPRINT_FILE = "base_fingerprint.json"
"""Beside the adapter: which weights it belongs to. A file of its own, since PEFT warns about keys it does not know."""


def unused_modules(model: nn.Module) -> list[nn.Module]:
    """Parts that no action depends on: what the vision backbone never runs, and mostly the language-model head."""
    parts: Any = model
    heads = [] if parts.config.action_head == "discrete" else [parts.language_model.lm_head]
    return [*parts.vision_backbone.unused_modules(), *heads]


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the modules that get an adapter: every linear layer and patch convolution that actions depend on."""
    unused = {id(module) for part in unused_modules(model) for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module) not in unused and not is_film(name)
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
    unused = {id(parameter) for part in unused_modules(model) for parameter in part.parameters()}
    inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or (is_film(name) and id(parameter) not in unused))
        if parameter.requires_grad:
            # bfloat16 has eight bits: an Adam step of 1e-4 on a weight near 1 would round to nothing.
            parameter.data = parameter.data.float()
    return config


def has_lora(model: nn.Module) -> bool:
    """Whether adapters are attached."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def low_rank_delta(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """What an adapter adds to its layer's weight, in float32 on the CPU: the same bits wherever and whenever computed.

    Args:
        a: (rank, in) of a linear layer, (rank, in, height, width) of a convolution.
        b: (out, rank), or (out, rank, 1, 1).
        scale: alpha / rank.

    Returns:
        (out, in) or (out, in, height, width).
    """
    a, b = a.detach().to("cpu", torch.float32), b.detach().to("cpu", torch.float32)
    return (b.flatten(1) @ a.flatten(1)).mul_(scale).reshape(len(b), *a.shape[1:])


def merge_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`weight` plus `low_rank_delta`, added in float32 and rounded once to the dtype of `weight`; on the CPU."""
    return (weight.detach().to("cpu", torch.float32) + low_rank_delta(a, b, scale)).to(weight.dtype)


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
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            base.weight.data = merge_weight(base.weight.data, a, b, layer.scaling[ADAPTER])
            model.set_submodule(name, base)
        yield
    finally:
        for (name, layer), weight in zip(layers, base_weights, strict=False):
            layer.get_base_layer().weight.data = weight
            model.set_submodule(name, layer)


def save_adapter(
    model: nn.Module, config: LoraConfig, directory: Path, base: str, base_fingerprint: str | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does for a wrapped model.

    The parameters of a pruner that has some are trained beside the adapters, so they are written with them.

    Args:
        model: with adapters attached.
        config: what `attach_lora` returned.
        directory: made if missing.
        base: path or hub id of the checkpoint that the adapters belong to.
        base_fingerprint: of that checkpoint's weights, written beside the adapter; checked before merging.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    state |= {name: value for name, value in model.state_dict().items() if name.startswith("pruner.")}
    tensors = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = base
    config.save_pretrained(str(directory))
    if base_fingerprint is not None:
        content = {"base": base, "base_fingerprint": base_fingerprint}
        (directory / FINGERPRINT_FILE).write_text(json.dumps(content, indent=2))
