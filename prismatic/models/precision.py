"""In which dtype to compute: by name, or what the device computes in."""

from collections.abc import Mapping
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def check_device(device: torch.device | str | int) -> torch.device:
    """The device of that name. Raises ValueError for a name that torch does not know, and a GPU that is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is unknown; known: cpu, cuda, cuda:0, cuda:1 and so on") from error
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {device!r}: torch sees {count} GPUs; give another device, cpu for example")
    return found


def computes_in_bf16(device: torch.device | str) -> bool:
    """Whether a GPU, or a CPU by instructions of its own, computes in bfloat16 instead of emulating it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def stored_dtype(config_json: Mapping[str, Any]) -> torch.dtype:
    """Of a checkpoint's weights, as `config.json` records it; bfloat16 where it does not, as published ones are.

    Raises ValueError for an unknown one.
    """
    recorded = config_json.get("torch_dtype") or config_json.get("dtype") or "bfloat16"
    return parse_dtype(str(recorded), "torch_dtype")


def inference_dtype(wanted: torch.dtype | str | None, device: torch.device | str) -> torch.dtype:
    """The dtype to run a policy in.

    Args:
        wanted: a dtype or its name; "auto" or None: bfloat16 on a GPU and where the CPU computes in it, else float32.
        device: where to run.

    Raises ValueError listing the choices.
    """
    if wanted is None or wanted == "auto":
        on_gpu = torch.device(device).type == "cuda"
        return torch.bfloat16 if on_gpu or computes_in_bf16(device) else torch.float32
    return parse_dtype(wanted, "dtype", ("auto",))


def parse_dtype(value: torch.dtype | str, label: str, further: tuple[str, ...] = ()) -> torch.dtype:
    """A floating dtype by name or itself. Raises ValueError that names `label` and lists the choices."""
    found = value if isinstance(value, torch.dtype) else DTYPES.get(str(value).removeprefix("torch."))
    if found is None or not found.is_floating_point:
        raise ValueError(f"{label} {value!r} is unknown; known: {', '.join((*further, *DTYPES))}")
    return found
