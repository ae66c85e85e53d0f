"""Weights in 8 or 4 bits for inference, by bitsandbytes."""

import importlib.util
from typing import Any

import torch

KINDS = ("8bit", "4bit")


def check_quantization(kind: str) -> None:
    """Raises ValueError for an unknown kind, or where bitsandbytes or a GPU is missing."""
    if kind not in KINDS:
        raise ValueError(f"unknown quantization {kind!r}; known: {', '.join(KINDS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"loading in {kind} needs bitsandbytes: pip install bitsandbytes, or leave the flag out")
    if not torch.cuda.is_available():
        raise ValueError(f"loading in {kind} needs a CUDA device, and torch finds none; leave the flag out")


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
