"""FSDP2: each process holds its share of every weight, gradient and average, and all of one block while it runs.

torch's `fully_shard` gathers a module's weights when the module is called and lets them go behind it, forward and back.
So a unit must be a module that is only ever called as a whole; what belongs to none is gathered for the whole pass.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from prismatic.models.action_heads import MLPResNet
from prismatic.models.llama import called_in_parts
from prismatic.models.lora import unused_modules
from prismatic.models.sites import LlamaLayer
from prismatic.training.distributed import Ranks
from prismatic.training.step import TrainableVLA


def shard(module: TrainableVLA, ranks: Ranks) -> dict[str, nn.Parameter]:
    """Divide a module among all processes, in place, and move this one's share to its device; all processes call it.

    Weights come from where the module has them, the same in every process.

    Returns:
        The trained parameters, now divided, by name.
    """
    # What a linear layer returns is a view of a matrix, and nobody adds to what a unit returns in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for unit in sharded_units(module):
        fully_shard(unit, mesh=mesh)
    # Gathered again in the backward pass: else weights behind a validation would stay what it was computed with.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(module, "sampled_l1")
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


def gathered_bytes(module: TrainableVLA) -> int:
    """Most bytes of whole weights, and of whole gradients, that a process holds for a moment beside its share.

    What belongs to no unit, and the largest unit twice: while it runs the next one is gathered, and its gradients are
    copied for the exchange.
    """
    units = sharded_units(module)
    idle = {id(parameter) for part in unused_modules(module.model) for parameter in part.parameters()}
    in_units = {id(parameter) for unit in units for parameter in unit.parameters()}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in in_units | idle]
    largest = max(_whole_bytes(p for p in unit.parameters() if id(p) not in idle) for unit in units)
    return _whole_bytes(rest) + 2 * largest


def _whole_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes * (2 if parameter.requires_grad else 1) for parameter in parameters)


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
