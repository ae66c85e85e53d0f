"""How a run computes where that is a matter of speed: chosen by measurement when it begins, kept while it lasts.

A run that goes on repeats the choice of its beginning. A measurement may fall out the other way the next time, and
other kernels round differently.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from prismatic.extern.hf.building import NoValues, build_backbone
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.libraries import LlamaConfig
from prismatic.models.llama import PLAIN, plain_attention
from prismatic.models.precision import computes_in_bf16, lists_bf16
from prismatic.models.vision_backbone import PrismaticVisionBackbone
from prismatic.stored_files import read_json
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.runs.resuming import Resumption

log = logging.getLogger(__name__)

FUSED = "sdpa"
"""torch's scaled-dot-product attention, which keeps no scores."""
_ROUNDS = 4
"""Measurements of each kind, by turns; the first does not count."""
_CONTEXT = 90
"""Rows behind the visual tokens, about: state, prompt, action tokens."""
_LARGEST = 2**22
"""Scores of one measurement, at most: a few hundredths of a second, and more than a cache holds."""


@dataclass(frozen=True)
class Computing:
    """What decides a step's speed and its last digits.

    Attributes:
        device: `cpu` or `cuda`, where that was chosen.
        bf16: whether under bfloat16 autocast.
        llm_attention: `sdpa` or `plain`, of the language model.
        vit_attention: the same, of the ViTs.
    """

    device: str
    bf16: bool
    llm_attention: str = FUSED
    vit_attention: str = FUSED

    def apply(self, model: OpenVLAForActionPrediction) -> None:
        """Have the model attend that way."""
        model.language_model.set_attn_implementation(self.llm_attention)
        for vit in model.vision_backbone.vits:
            for module in vit.modules():
                if hasattr(module, "fused_attn"):
                    setattr(module, "fused_attn", self.vit_attention == FUSED)  # noqa: B010 - not nn.Module's

    def to_json(self) -> dict[str, Any]:
        """As `run.json` and training states hold it."""
        return asdict(self)


def choose_computing(config: FinetuneConfig, folder: Path, device: torch.device) -> Computing:
    """What is quickest here. On a CPU attention is measured, forward and back, once for a process.

    Args:
        config: the flags; `--precision` decides where it is not `auto`.
        folder: checkpoint, whose sizes count.
        device: to train on.
    """
    bf16 = computes_in_bf16(device) if config.precision == "auto" else config.precision == "bf16"
    if device.type != "cpu":
        return Computing(device.type, bf16)
    recorded = read_json(folder / "config.json")
    model = OpenVLAConfig(**{name: value for name, value in recorded.items() if name != "model_type"})
    with NoValues():
        backbone = build_backbone(model)
    return measured_computing(backbone, model.llama, config.batch_size, config.num_images_in_input, bf16)


def measured_computing(
    backbone: PrismaticVisionBackbone, llama: LlamaConfig, batch_size: int, num_images: int, bf16: bool
) -> Computing:
    """The quicker attention of a CPU for both parts of such a model; its weights may be on the meta device."""
    vit: Any = backbone.featurizer
    attention, patches, heads = vit.blocks[0].attn, backbone.patches_per_image, llama.num_attention_heads
    in_llm = (batch_size, heads, num_images * patches + _CONTEXT, llama.hidden_size // heads)
    in_vit = (batch_size * num_images, attention.num_heads, patches, attention.head_dim)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Computing("cpu", bf16, quicker_attention(in_llm, dtype), quicker_attention(in_vit, dtype))


def agreed_computing(config: FinetuneConfig, folder: Path, ranks: Ranks, resumption: Resumption | None) -> Computing:
    """The run's own choice, or what the main process now chooses; all processes call it."""
    recorded: Mapping[str, Any] | None = resumption.state.get("computing") if resumption else None
    if recorded is not None and recorded["device"] == ranks.device.type:
        return Computing(**recorded)
    chosen = choose_computing(config, folder, ranks.device) if ranks.is_main else None
    if chosen is not None and resumption is not None and recorded is None and config.precision == "auto":
        chosen = replace(chosen, bf16=lists_bf16(ranks.device))  # a run of an earlier version began so
    return ranks.gather(chosen)[0]


@functools.cache
def quicker_attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> str:
    """`sdpa` or `plain`, whichever takes a thread less time of its own, forward and back.

    By one thread's processor time, since beside other work the clock says more about that than about the kernels.

    Args:
        shape: B, heads, S, d; of a large batch a part is measured.
        dtype: of queries, keys and values.
    """
    batch, heads, length, width = shape
    batch = max(1, min(batch, _LARGEST // (heads * length**2)))
    generator = torch.Generator().manual_seed(0)
    query, key, value = states = [
        torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    mask = torch.zeros(batch, 1, 1, length, dtype=dtype).expand(-1, 1, length, -1)
    module = SimpleNamespace(num_key_value_groups=1)

    def plain() -> torch.Tensor:
        return plain_attention(module, query, key, value, mask, width**-0.5)[0]

    def fused() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    kinds = {FUSED: fused, PLAIN: plain}
    best = dict.fromkeys(kinds, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(_ROUNDS):
            for name, attend in kinds.items():
                seconds = _seconds(attend, states)
                best[name] = min(best[name], seconds) if number else math.inf
    finally:
        torch.set_num_threads(threads)
    told = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in best.items())
    log.debug("attention over %s in %s: %s", (batch, *shape[1:]), dtype, told)
    return min(best, key=lambda name: best[name])


def _seconds(attend: Callable[[], torch.Tensor], states: list[torch.Tensor]) -> float:
    began = time.thread_time()
    outcome = attend()
    torch.autograd.grad(outcome, states, torch.ones_like(outcome))
    return time.thread_time() - began
