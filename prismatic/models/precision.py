"""In which dtype to compute: by name, or in what the device computes faster."""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from prismatic.machine import read_machine

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CLEARLY_FASTER = 1.25
"""So many times as fast bfloat16 must be on a CPU: less does not pay for eight bits of precision."""
_ROWS, _WIDTH, _ROUNDS = 128, 1024, 4  # of the matrix product that is timed
_SPARE = 2 * 2**30  # bytes that a process takes beside a large model's weights


def check_device(device: torch.device | str | int) -> torch.device:
    """The device of that name; `auto` is a GPU where torch sees one, else the CPU.

    Raises ValueError for a name that torch does not know, a device that is not there, and one without values (meta).
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is unknown; known: auto, cpu, cuda, cuda:0, cuda:1 and so on") from error
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {device!r}: torch sees {count} GPUs; give another device, cpu for example")
    if found.type == "meta":
        raise ValueError(
            f"device {device!r} holds no values, so nothing acts there; give another device, cpu for example"
        )
    if found.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError) as error:  # each kind has its own way to say that it is missing
            raise ValueError(
                f"device {device!r} is not there ({str(error).splitlines()[0]}); give another device, cpu for example"
            ) from error
    return found


@functools.lru_cache
def bf16_speedup() -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16.

    Measured as torch would run a linear layer, some twenty milliseconds of one thread, once per process. What counts is
    that thread's processor time: by the clock, beside other work, most tries told the wrong dtype. What a CPU's flags
    list does not tell: with the same instructions one is four times as fast, another half as fast.
    """
    layers = {}
    for dtype in (torch.float32, torch.bfloat16):
        layers[dtype] = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    seconds = dict.fromkeys(layers, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for number in range(_ROUNDS + 1):
                for dtype, (rows, weight) in layers.items():
                    start = time.thread_time()
                    F.linear(rows, weight)
                    if number:  # the first call prepares
                        seconds[dtype] = min(seconds[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def computes_in_bf16(device: torch.device | str) -> bool:
    """Whether a GPU computes in bfloat16 instead of emulating it, or a CPU is clearly faster in it than in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16_speedup() >= CLEARLY_FASTER


def lists_bf16(device: torch.device | str) -> bool:
    """Whether a GPU computes in bfloat16, or a CPU lists instructions for it, however fast they are.

    What runs went by whose checkpoints record no precision.
    """
    if torch.device(device).type == "cuda":
        return computes_in_bf16(device)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def stored_dtype(config_json: Mapping[str, Any]) -> torch.dtype:
    """Of a checkpoint's weights, as `config.json` records it; bfloat16 where it does not, as published ones are.

    Raises ValueError for an unknown one.
    """
    recorded = config_json.get("torch_dtype") or config_json.get("dtype") or "bfloat16"
    return parse_dtype(str(recorded), "torch_dtype")


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype, and in words why it is that one."""

    dtype: torch.dtype
    reason: str


def choose_dtype(
    wanted: torch.dtype | str | None, device: torch.device | str, num_parameters: int | None = None
) -> DtypeChoice:
    """The dtype to run a policy in.

    Args:
        wanted: a dtype or its name; "auto" or None: bfloat16 on a GPU; on a CPU bfloat16 where it is clearly faster or
            float32 weights would not fit into the memory that is left, else float32.
        device: where to run.
        num_parameters: of the policy; None where nobody knows, then they count as fitting.

    Raises ValueError listing the choices.
    """
    if not (wanted is None or wanted == "auto"):
        return DtypeChoice(parse_dtype(wanted, "dtype", ("auto",)), "asked for")
    if torch.device(device).type == "cuda":
        return DtypeChoice(torch.bfloat16, "the device is a GPU")
    needed, left = torch.float32.itemsize * (num_parameters or 0), read_machine().memory_bytes
    if left is not None and needed + _SPARE > left and needed > _SPARE:
        words = f"float32 weights would take {needed / 2**30:.1f} GiB of the {left / 2**30:.1f} GiB of memory left"
        return DtypeChoice(torch.bfloat16, words)
    speedup = bf16_speedup()
    words = f"bfloat16 runs at {speedup:.2f} times the speed of float32"
    return DtypeChoice(torch.bfloat16 if speedup >= CLEARLY_FASTER else torch.float32, words)


def parse_dtype(value: torch.dtype | str, label: str, further: tuple[str, ...] = ()) -> torch.dtype:
    """A floating dtype by name or itself. Raises ValueError that names `label` and lists the choices."""
    found = value if isinstance(value, torch.dtype) else DTYPES.get(str(value).removeprefix("torch."))
    if found is None or not found.is_floating_point:
        raise ValueError(f"{label} {value!r} is unknown; known: {', '.join((*further, *DTYPES))}")
    return found
