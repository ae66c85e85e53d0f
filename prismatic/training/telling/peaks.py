"""How much memory this process has held at most."""

import resource
import sys

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere


def peak_memory(device: torch.device) -> dict[str, float]:
    """`host_peak_gb` of this process, without those that read data; on a GPU also `device_peak_gb` of its tensors."""
    peaks = {"host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e9}
    if device.type == "cuda":
        peaks["device_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peaks
