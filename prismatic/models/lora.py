"""Low-rank adapters: where they go, how they are attached, merged for a checkpoint, and written to a folder."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from peft.tuners.lora import LoraLayer
from torch import nn

from prismatic.lazy_tensors import LazyTensor, write_tensors
from prismatic.models.film import is_film

ADAPTER = "default"
FOLDER = "lora_adapter"
"""Of a checkpoint: where its adapter lies."""
PREFIX = "base_model.model."
"""Of every tensor in an adapter file, as PEFT names a wrapped model's."""
FINGERPRINT_FILE = "base_fingerprint.json"
"""Beside the adapter: which weights it belongs to. A file of its own, since PEFT warns about keys it does not know."""


class _LeanForward:
    """The same sum as PEFT's, with less of it in memory: a layer with its one adapter, neither merged nor switched off.

    Under autocast the input stays what it is, where PEFT makes a float32 copy of it for every adapter, which autocast
    then makes a bfloat16 one of, to be kept for the backward pass. The scale goes on the rank's few columns instead of
    on the layer's many.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the layer beneath, and its adapter's share on top; in the dtype of the former."""
        layer: Any = self
        if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
            whole: Any = super()
            return whole.forward(x, *args, **kwargs)
        result, a, b = layer.base_layer(x), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.weight.dtype)
        low = a(layer.lora_dropout[ADAPTER](x))
        if (scale := layer.scaling[ADAPTER]) != 1:
            low = low * scale
        result += b(low)  # no layer needs its outcome in the backward pass
        return result


class AdaptedLinear(_LeanForward, peft_lora.Linear):
    """A linear layer and its adapter."""


class AdaptedConv2d(_LeanForward, peft_lora.Conv2d):
    """A convolution and its adapter."""


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
    config._register_custom_module({nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d})
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
    return low_rank_delta(a, b, scale).add_(weight.detach().to("cpu", torch.float32)).to(weight.dtype)


def merged_weights(model: nn.Module, given: Mapping[str, torch.Tensor] | None = None) -> dict[str, LazyTensor]:
    """The weights of `model` by their plain, published names, its adapters' effect in them. The model stays as it is.

    Each is made on the CPU when it is written: so saving takes no device memory, and little of the host's.

    Args:
        model: with or without adapters.
        given: tensors to take instead of the model's, by their names in its state dict. Copies of all that is trained,
            for a thread that writes while training goes on: what is frozen can be read meanwhile.
    """
    state = {**model.state_dict(), **(given or {})}
    adapters: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    weights = {}
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if layer not in adapters:
            weights[name] = LazyTensor.of(value)
        elif leaf == "weight":
            a, b = (state[f"{layer}.lora_{which}.{ADAPTER}.weight"] for which in "AB")
            make = partial(merge_weight, value, a, b, adapters[layer].scaling[ADAPTER])
            weights[f"{layer}.{leaf}"] = LazyTensor(tuple(value.shape), value.dtype, make)
        else:
            weights[f"{layer}.{leaf}"] = LazyTensor.of(value)
    return weights


def save_adapter(
    model: nn.Module,
    config: LoraConfig,
    directory: Path,
    base: str,
    base_fingerprint: str | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does for a wrapped model.

    The parameters of a pruner that has some are trained beside the adapters, so they are written with them.

    Args:
        model: with adapters attached.
        config: what `attach_lora` returned.
        directory: made if missing.
        base: path or hub id of the checkpoint that the adapters belong to.
        base_fingerprint: of that checkpoint's weights, written beside the adapter; checked before merging.
        given: all that is trained, by its names in the model's state dict; None: the model's own.

    Raises FloatingPointError for a tensor that is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if given is None else dict(given)
    adapter = get_peft_model_state_dict(model, state, adapter_name=ADAPTER, save_embedding_layers=False)
    adapter |= {name: value for name, value in state.items() if name.startswith("pruner.")}
    tensors = {f"{PREFIX}{name}": LazyTensor.of(tensor) for name, tensor in adapter.items()}
    write_tensors(directory / "adapter_model.safetensors", tensors)
    config.base_model_name_or_path = base
    config.save_pretrained(str(directory))
    if base_fingerprint is not None:
        content = {"base": base, "base_fingerprint": base_fingerprint}
        (directory / FINGERPRINT_FILE).write_text(json.dumps(content, indent=2))
