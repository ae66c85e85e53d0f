"""Which kernels compute on a CPU: measured when an engine begins, never guessed from the processor's name.

What torch takes by itself stays unless something else is clearly faster (`CLEARLY`), so that near ties do not make two
runs differ in rounding.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.inference.layers import Kernels, Multiply, attend_fused, attend_plainly, multiply_as_torch
from prismatic.machine import read_machine

CLEARLY = 1.25
"""How many times as fast as torch's own choice another kernel must be to take its place."""

_ROUNDS = 5
_ROWS, _MOST_IN, _MOST_OUT = 176, 2048, 4096
"""Of the product that linear layers are judged by: the model's largest, as far as it can be had in milliseconds."""
_KEPT_SHARE = 0.25
"""Of the memory that is available, what float32 copies of weights may take."""

Choice = TypeVar("Choice")


def fastest(candidates: Mapping[str, Callable[[], object]], rounds: int = _ROUNDS) -> str:
    """Name of the candidate to take: the first, unless another's best time is `CLEARLY` better.

    Candidates take turns; each is called once before, and its best time counts, since other processes only add to it.
    """
    best: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
            best[name] = min(best.get(name, seconds), seconds)
    default, winner = next(iter(candidates)), min(best, key=lambda name: best[name])
    return winner if best[default] > CLEARLY * best[winner] else default


class Widened:
    """Linear layers with weights in half precision, multiplied in float32: for CPUs that only emulate the former.

    Args:
        keep: whether the float32 copies of weights stay, or are made at every call.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._kept: dict[int, tuple[nn.Linear, torch.Tensor, torch.Tensor | None]] = {}

    def __call__(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if type(linear) is not nn.Linear:  # quantized, or wrapped by an adapter
            return linear(x)
        kept = self._kept.get(id(linear))
        if kept is None or kept[0] is not linear:
            kept = linear, linear.weight.float(), None if linear.bias is None else linear.bias.float()
            if self.keep:
                self._kept[id(linear)] = kept
        return F.linear(x.float(), kept[1], kept[2]).to(x.dtype)


class OneDNN:
    """Linear layers in float32 by oneDNN, with weights laid out for it once: where torch's own library is slow."""

    def __init__(self) -> None:
        self._packed: dict[int, tuple[nn.Linear, torch.Tensor, torch.Tensor | None]] = {}

    def __call__(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if type(linear) is not nn.Linear:
            return linear(x)
        packed = self._packed.get(id(linear))
        if packed is None or packed[0] is not linear:
            bias = None if linear.bias is None else linear.bias.detach().to_mkldnn()
            packed = self._packed[id(linear)] = linear, linear.weight.detach().to_mkldnn(), bias
        rows = x.reshape(-1, x.shape[-1]).to_mkldnn()
        product = torch.ops.aten.mkldnn_linear(rows, packed[1], packed[2]).to_dense()
        return product.view(*x.shape[:-1], product.shape[-1])


def choose_kernels(model: nn.Module, dtype: torch.dtype) -> Kernels:
    """For a model on a CPU that computes in `dtype`."""
    vit, llm = (_attention(dtype, torch.get_num_threads(), rows) for rows in (257, 176))
    name, multiply = _linear(model, dtype)
    attends = {"fused": attend_fused, "plain": attend_plainly}
    names = (("vit attention", vit), ("llm attention", llm), ("linear", name))
    return replace(Kernels(), vit_attention=attends[vit], llm_attention=attends[llm], multiply=multiply, names=names)


def _linear(model: nn.Module, dtype: torch.dtype) -> tuple[str, Multiply]:
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    copies = 4 * sum(layer.weight.numel() for layer in layers)
    keep = copies < _KEPT_SHARE * (read_machine().memory_bytes or 0)
    largest = max(layers, key=lambda layer: layer.weight.numel())  # widening it at every call must pay, too
    sides = min(largest.in_features, _MOST_IN), min(largest.out_features, _MOST_OUT)
    name = _fastest_linear(dtype, keep, sides, torch.get_num_threads())
    makers: dict[str, Callable[[], Multiply]] = {"onednn": OneDNN, "float32": partial(Widened, keep)}
    multiply = makers[name]() if name in makers else multiply_as_torch
    return f"float32, weights widened {'once' if keep else 'at every call'}" if name == "float32" else name, multiply


@lru_cache
@torch.inference_mode()
def _fastest_linear(dtype: torch.dtype, keep: bool, sides: tuple[int, int], threads: int) -> str:
    """With `threads`, which only tell measurements apart."""
    linear, x = nn.Linear(*sides, dtype=dtype), torch.randn(1, _ROWS, sides[0], dtype=dtype)
    candidates: dict[str, Multiply] = {"torch": multiply_as_torch}
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        candidates["onednn"] = OneDNN()
    if dtype in (torch.bfloat16, torch.float16):
        candidates["float32"] = Widened(keep)
    return fastest({name: partial(multiply, linear, x) for name, multiply in candidates.items()})


@lru_cache
@torch.inference_mode()
def _attention(dtype: torch.dtype, threads: int, rows: int) -> str:
    q, k, v = (torch.randn(1, 8, rows, 64, dtype=dtype) for _ in range(3))
    return fastest({"fused": partial(attend_fused, q, k, v, None), "plain": partial(attend_plainly, q, k, v, None)})
