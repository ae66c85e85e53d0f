"""FSDP2: each process holds its share of every weight, gradient and average, and all of one block while it runs.

torch's `fully_shard` gathers a module's weights when the module is called and lets them go behind it, forward and back.
So a unit must be a module that is only ever called as a whole; what belongs to none is gathered for the whole pass.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from prismatic.models.action_heads import MLPResNet
from prismatic.models.llama import called_in_parts
from prismatic.models.lora import has_lora, unused_modules
from prismatic.models.sites import LlamaLayer
from prismatic.training.distributed import Ranks
from prismatic.training.step import TrainableVLA

_ROUNDED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Weights are gathered as autocast would round them; gradients are summed in float32."""


def shard(module: TrainableVLA, ranks: Ranks, frozen_dtype: torch.dtype | None = None) -> dict[str, nn.Parameter]:
    """Divide a module among all processes, in place, and move this one's share to its device; all processes call it.

    Weights come from where the module has them, the same in every process, one unit after another.

    Args:
        module: what is trained is marked.
        ranks: the processes.
        frozen_dtype: of the others; None: as they are. What is trained becomes float32.

    Returns:
        The trained parameters, now divided, by name.
    """
    # What a linear layer returns is a view of a matrix, and nobody adds to what a unit returns in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    rounded = rounded_units(module)
    for unit in sharded_units(module):
        _cast(unit, frozen_dtype)
        fully_shard(unit, mesh=mesh, mp_policy=_ROUNDED if unit in rounded else MixedPrecisionPolicy())
    _cast(module, frozen_dtype)
    # Gathered again in the backward pass: else weights behind a validation would stay what it was computed with.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(module, "predict")
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def sharded_units(module: TrainableVLA) -> list[nn.Module]:
    """The modules that are gathered one at a time: blocks, layers, projector, head, and what is never called."""
    held: set[int] = set()
    units = []
    for unit in _candidates(module):
        parameters = {id(parameter) for parameter in unit.parameters()}
        if parameters and not parameters & held:  # none has parts of another
            held |= parameters
            units.append(unit)
    return units


def _cast(module: nn.Module, frozen_dtype: torch.dtype | None) -> None:
    for parameter in module.parameters():
        dtype = torch.float32 if parameter.requires_grad else frozen_dtype or parameter.dtype
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def rounded_units(module: TrainableVLA) -> list[nn.Module]:
    """Units that are gathered in bfloat16: Llama layers and projector, where all weights are trained under autocast.

    Autocast would round them anyway, and keep what it has rounded of the whole model until the backward pass. ViT
    blocks and heads are not: a LayerNorm beside float32 rows takes float32 weights.
    """
    if not module.bf16 or has_lora(module.model):
        return []
    units = sharded_units(module)
    return [unit for unit in units if not any(isinstance(part, nn.LayerNorm) for part in unit.modules())]


def gathered_bytes(module: TrainableVLA) -> int:
    """Most bytes of whole weights, and of whole gradients, that a process holds for a moment beside its share.

    Those of what belongs to no unit, and of the largest unit with the weights of the next one.
    """
    units, rounded = sharded_units(module), rounded_units(module)
    idle = {id(parameter) for part in unused_modules(module.model) for parameter in part.parameters()}
    in_units = {id(parameter) for unit in units for parameter in unit.parameters()}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in in_units | idle]
    largest = 0
    for unit in units:
        used = [parameter for parameter in unit.parameters() if id(parameter) not in idle]
        largest = max(largest, sum(_whole_bytes(parameter, 2, unit in rounded) for parameter in used))
    return largest + sum(_whole_bytes(parameter, 1, False) for parameter in rest)


def _whole_bytes(parameter: nn.Parameter, copies: int, rounded: bool) -> int:
    """Of a weight so many times, of its gradient, and of the float32 copy of that which is exchanged."""
    size = torch.bfloat16.itemsize if rounded else parameter.itemsize
    gradient = size + torch.float32.itemsize if parameter.requires_grad else 0
    return parameter.numel() * (copies * size + gradient)


def _candidates(module: TrainableVLA) -> Iterator[nn.Module]:
    model = module.model
    for vit in model.vision_backbone.vits:
        yield from vit.blocks
    yield model.projector
    llama: Any = model.language_model.model
    site = model.site
    in_parts = called_in_parts(len(llama.layers), site.layer if isinstance(site, LlamaLayer) else None)
    for number, layer in enumerate(llama.layers):
        if number in in_parts:
            attention = layer.self_attn
            yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, layer.mlp)
        else:
            yield layer
    if model.language_model.lm_head.weight is not llama.embed_tokens.weight:
        yield model.language_model.lm_head
    yield from unused_modules(model)
    head: Any = module.action_head
    yield from (part for part in head.modules() if isinstance(part, MLPResNet))
