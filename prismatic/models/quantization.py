"""The language model in fewer bits for inference: fp8 by torchao is faster, 8bit and 4bit by bitsandbytes are smaller
and slower."""

import importlib.util
from typing import Any

import torch
from torch import nn

KINDS = ("8bit", "4bit", "fp8")
_FP8_CAPABILITY = (8, 9)
"""Of the first GPUs that multiply in fp8 (Ada, Hopper)."""

_LEAST_SCALED = 1e-12
"""Far below any activation; a row of nothing smaller stays zero."""


def check_quantization(kind: str) -> None:
    """Raises ValueError for an unknown kind, or where its library or a GPU that can do it is missing."""
    if kind not in KINDS:
        raise ValueError(f"unknown quantization {kind!r}; known: {', '.join(KINDS)}")
    if not torch.cuda.is_available():
        raise ValueError(f"loading in {kind} needs a CUDA device, and torch finds none; leave the flag out")
    library = "torchao" if kind == "fp8" else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"loading in {kind} needs {library}: pip install {library}, or leave the flag out")
    if kind == "fp8" and (found := torch.cuda.get_device_capability()) < _FP8_CAPABILITY:
        raise ValueError(
            f"loading in fp8 needs a GPU of compute capability {_version(_FP8_CAPABILITY)} or newer, and "
            f"{torch.cuda.get_device_name()} has {_version(found)}; leave the flag out"
        )


def convert_to_fp8(layers: nn.Module) -> None:
    """Linear layers on a GPU to fp8 weights with a scale per row, activations scaled per row as they come.

    A row of zeros, as every action's place is before the first layer, has no scale of its own: torchao divides by zero
    unless it is told the least value to scale by.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_lb=_LEAST_SCALED)
    quantize_(layers, config)


def quantization_config(kind: str) -> Any:
    """What `from_pretrained` takes. Only the LLM's layers are quantized: the rest is small and reads pixels."""
    from transformers import BitsAndBytesConfig

    kept = ["vision_backbone", "projector", "lm_head"]
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=kept,
    )


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
