"""What the machine can do at best, measured here, and what a process takes of its memory."""

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prismatic.machine import read_machine, resident_bytes

_SIDE = {"cpu": 512, "cuda": 8192}  # on a CPU over before another process is given the core
_COPIED = {"cpu": 2**27, "cuda": 2**31}
_SECONDS = 1.0  # for each kind of product, and for the copy
_STATUS = Path("/proc/self/status")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _least_seconds(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The quickest call of those that the time has room for, three at least: what else runs only makes it longer."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    work()
    while len(times) < 3 or time.perf_counter() < end:
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


@torch.inference_mode()
def peak_flops(
    device: torch.device, dtype: torch.dtype, side: int = 0, seconds: float = _SECONDS
) -> tuple[float, dict[str, float]]:
    """Operations per second of a large matrix product, a multiply-add counting two.

    Returns:
        The best, and each way's: by torch as it comes, and on a CPU by oneDNN too, which is twice as fast on some.
    """
    side = side or _SIDE[device.type]
    a, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    ways: dict[str, Callable[[], Any]] = {"torch": lambda: torch.mm(a, weight, out=out)}
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype != torch.float16:
        onednn: Any = torch.ops.mkldnn
        packed = onednn._reorder_linear_weight(weight, side)
        ways["oneDNN"] = lambda: onednn._linear_pointwise(a, packed, None, "none", [], "")
    reached = {name: 2 * side**3 / _least_seconds(work, device, seconds) for name, work in ways.items()}
    return max(reached.values()), reached


@torch.inference_mode()
def copy_bandwidth(device: torch.device, size: int = 0, seconds: float = _SECONDS) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.zeros(size or _COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _least_seconds(lambda: target.copy_(source), device, seconds)


def release_memory(device: torch.device) -> None:
    """Give what is free back to the system, and begin to look for the peak anew."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size from now on
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since `release_memory`: that tensors held on a GPU, that the process held without one.

    0 on systems that do not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) * 2**10 for line in lines if line.startswith("VmHWM:")), 0)


def held_memory(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU now, or that the process holds without one."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    machine = read_machine()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": machine.cores,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
