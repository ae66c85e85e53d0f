"""What an action takes, by component: operations, bytes of weights, the floor that a device sets, calls of operators.

A multiply-add counts two operations, and only matrix products and convolutions count, as in `prismatic.models.flops`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from prismatic.models.contract import ActionHead, ActionModel
from prismatic.models.flops import count_flops

AGREEMENT = 0.01
"""How far, relative, the formula and torch's counter may lie apart."""
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
COMPONENTS = ("vision", "projector", "pruner", "llm", "lm_head", "action_head")
"""`projector` holds the state's, `lm_head` what makes logits that nobody reads."""


@dataclass(frozen=True)
class Prompted:
    """A policy's parts and what they are asked for.

    Attributes:
        model, action_head, proprio_projector: the parts; the projector may be None.
        kept: visual tokens that stay, of each image where that counts; None: all, without a pruner.
        prompt_tokens: BOS, prompt and empty piece.
    """

    model: ActionModel
    action_head: ActionHead
    proprio_projector: nn.Module | None
    kept: int | Sequence[int] | None
    prompt_tokens: int

    @property
    def sequence_length(self) -> int:
        """S of the language model's last layer: BOS, what is kept, state, prompt, actions, stop."""
        number = self.model.num_visual_tokens if self.kept is None else self.kept
        visual = number if isinstance(number, int) else sum(number)
        state = self.proprio_projector is not None
        return 1 + visual + state + self.prompt_tokens - 1 + self.model.robot.num_action_tokens + 1


def eager_flops(asked: Prompted) -> dict[str, int]:
    """Of the eager engine, by component."""
    return _flops(asked, only_read_rows=False)


def _flops(asked: Prompted, only_read_rows: bool) -> dict[str, int]:
    count = count_flops(
        asked.model, asked.action_head, asked.proprio_projector, asked.kept, asked.prompt_tokens, only_read_rows
    ).to_json()
    projector = count["projector"] + count["proprio"]
    return {name: projector if name == "projector" else count.get(name, 0) for name in COMPONENTS}


def reference_flops(asked: Prompted) -> dict[str, int]:
    """Of the arm `reference`: the last block of each ViT and the LM head over every row beside what eager computes."""
    vision = 0
    for vit in asked.model.vision_backbone.vits:
        tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
        vision += 2 * tokens * _weights(vit.blocks[-1]) + 4 * tokens**2 * vit.embed_dim
    flops = eager_flops(asked)
    flops["vision"] += vision * asked.model.num_images_in_input
    flops["lm_head"] = 2 * asked.sequence_length * _weights(asked.model.language_model.lm_head)
    return flops


def needed_flops(asked: Prompted) -> dict[str, int]:
    """The least for the same action, and what the compiled engine computes on a CPU: of Llama's last layer keys and
    values of all rows, the rest only of those that are read.

    As eager, where tokens are decoded one after another.
    """
    return _flops(asked, only_read_rows=True)


def _weights(module: nn.Module) -> int:
    """Multiply-adds per row over all linear layers of a module."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def weight_bytes(asked: Prompted, reference: bool = False) -> dict[str, int]:
    """Bytes of the weights that an action reads, by component; token embeddings, of which it reads a few rows, are 0.

    Args:
        asked: the parts.
        reference: as the arm `reference` reads them: all blocks of the ViTs, once per image, and the LM head.
    """
    model, head = asked.model, asked.action_head
    blocks = [vit.blocks[-1] for vit in model.vision_backbone.vits] if reference else []
    unused = [module for module in model.vision_backbone.unused_modules() if module not in blocks]
    unread = {id(parameter) for module in unused for parameter in module.parameters()}
    vision = sum(_bytes(p) for p in model.vision_backbone.parameters() if id(p) not in unread)
    llama: Any = model.language_model.model
    lm_head = _module_bytes(model.language_model.lm_head)
    reads_lm_head = head.kind in ("discrete", "autoregressive")
    return {
        "vision": vision * (model.num_images_in_input if reference else 1),
        "projector": _module_bytes(model.projector) + _module_bytes(asked.proprio_projector),
        "pruner": _module_bytes(model.pruner),
        "llm": _module_bytes(llama.layers) + _module_bytes(llama.norm),
        "lm_head": lm_head if reference else 0,
        "action_head": lm_head if reads_lm_head else _module_bytes(head),
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _module_bytes(module: Any) -> int:
    return 0 if module is None else sum(_bytes(parameter) for parameter in module.parameters())


def floor_seconds(flops: dict[str, int], read: dict[str, int], peak: float, bandwidth: float) -> float:
    """The least time: component after component, the longer of computing at the peak and of reading the weights once.

    Args:
        flops: operations by component.
        read: bytes by component.
        peak: operations per second.
        bandwidth: bytes per second.
    """
    return sum(max(flops[name] / peak, read[name] / bandwidth) for name in COMPONENTS)


def counted_flops(work: Callable[[], Any]) -> int:
    """What torch's counter sees of a call.

    Attention is taken apart into its matrix products, since the counter knows not every fused form, and oneDNN's linear
    layers are told to it. What older
    transformers compute of rotary angles by a matrix product is left out, as in the formula.
    """
    further: Any = {torch.ops.aten.mkldnn_linear: _onednn_linear_flops}
    counter = FlopCounterMode(display=False, custom_mapping=further)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        work()
    names = ("LlamaModel.rotary_emb", "LlamaForCausalLM.model.rotary_emb", "LlamaRotaryEmbedding")
    rotary = sum(sum(found.values()) for name, found in counter.get_flop_counts().items() if name in names)
    return counter.get_total_flops() - rotary


def _onednn_linear_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Shapes (..., I) and (O, I)."""
    return 2 * math.prod(rows) * weight[0]


def agree(formula: int, counted: int) -> bool:
    """Whether they lie at most `AGREEMENT` apart."""
    return abs(counted - formula) <= AGREEMENT * formula


@dataclass(frozen=True)
class Launched:
    """What one call gives the device to do.

    Attributes:
        number: on a GPU kernels that ran; on a CPU calls of aten operators, without those that they make themselves.
        launches: on a GPU calls of the driver that start kernels or whole graphs; None on a CPU.
    """

    number: int
    launches: int | None = None


def count_launches(work: Callable[[], Any], device: torch.device) -> Launched:
    """By torch's profiler, over one call."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: Any = profile.events() or []
    if on_gpu:
        copies = ("Memcpy", "Memset")
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(copies)]
        return Launched(len(kernels), sum(event.name in LAUNCHES for event in events))

    def outermost(event: Any) -> bool:
        return event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")

    return Launched(sum(event.name.startswith("aten::") and outermost(event) for event in events))
