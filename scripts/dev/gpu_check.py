"""Is this software right on this GPU, and how fast is it there? One command, ten minutes on an H100.

    python scripts/dev/gpu_check.py                      # on a GPU: the sizes of a 7B policy, random weights made there
    python scripts/dev/gpu_check.py --preset tiny        # the same on anything, in under a minute
    python scripts/dev/gpu_check.py --load True          # also what a cold start takes; needs 16 GB of disk

Prints one line per figure and writes all of them to `--output`. Sections stand for themselves: an error ends its
section, its traceback is kept, and the next one begins. Ends with 0, or with 1 where a section failed or a figure is
wrong.

Sections: `right` (numbers recorded from the research code, CPU against GPU, batches against single calls), `ceilings`
(what the card reaches at best), `latency` (one observation, eager and compiled), `fp8` (where torchao and the card
can), `batch` (several), `memory`, `load`, `train` (LoRA).
"""

import importlib.metadata
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # `scripts` and `tests` are no installed packages
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers.utils.logging import disable_progress_bar

from prismatic.command_line import parse_or_exit
from prismatic.models.precision import check_device
from scripts.dev import gpu_correctness, gpu_speed, gpu_training
from scripts.dev.gpu_figures import Section, run_section
from scripts.dev.gpu_model import PRESETS, Card

PACKAGES = ("torch", "transformers", "timm", "peft", "accelerate", "safetensors", "numpy", "pillow")
SECTIONS: dict[str, tuple[float, Callable[[Section, Card], None]]] = {
    "right": (200, gpu_correctness.right),
    "ceilings": (15, gpu_speed.ceilings),
    "latency": (200, gpu_speed.latency),
    "fp8": (60, gpu_speed.fp8),
    "batch": (50, gpu_speed.batch),
    "memory": (15, gpu_speed.memory),
    "load": (240, gpu_speed.load),
    "train": (65, gpu_training.train),
}
"""By name, in order: most seconds that it may take on a GPU, and its work."""

PATIENCE = 5
"""How much longer sections may take on a CPU, which other processes share."""


@dataclass
class CheckConfig:
    """What to check, and where the figures go."""

    preset: str = ""  # 7b or tiny; empty: 7b on a GPU, else tiny
    device: str = ""  # empty: the GPU, where there is one
    only: str = ""  # names of sections with commas between; empty: all but load
    load: bool = False  # also measure a cold start
    output: Path = Path("gpu_check.json")


def describe(device: torch.device, preset: str) -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    found: dict[str, Any] = {"preset": preset, "device": device.type, "python": platform.python_version()}
    found["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gb": properties.total_memory / 1e9,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def choose_sections(config: CheckConfig) -> list[str]:
    """Names in order. Raises ValueError for an unknown one."""
    if not config.only:
        return [name for name in SECTIONS if name != "load" or config.load]
    wanted = [name.strip() for name in config.only.split(",")]
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        raise ValueError(f"--only names {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in wanted]


def main() -> int:
    config = parse_or_exit(CheckConfig)
    try:
        device = check_device(config.device or "auto")
        preset = config.preset or ("7b" if device.type == "cuda" else "tiny")
        names = choose_sections(config)
        if preset not in PRESETS:
            raise ValueError(f"--preset {preset!r} is unknown; known: {', '.join(PRESETS)}")
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other take seconds beside other processes
    logging.disable(logging.WARNING)  # the small checkpoint leaves unsaid what warnings are about
    disable_progress_bar()
    warnings.filterwarnings("ignore", "Synchronization debug mode")
    began = time.perf_counter()
    found: dict[str, Any] = {"machine": describe(device, preset), "sections": {}}
    print(json.dumps(found["machine"]), flush=True)
    sections = []
    with tempfile.TemporaryDirectory() as folder:
        card = Card(device, PRESETS[preset], Path(folder))
        for name in names:
            limit, work = SECTIONS[name]
            sections.append(Section(name, limit if device.type == "cuda" else PATIENCE * limit))
            run_section(sections[-1], lambda section, work=work: work(section, card))  # type: ignore[misc]
            found["sections"][name] = sections[-1].to_json()
            found["seconds"] = time.perf_counter() - began
            config.output.write_text(json.dumps(found, indent=1))  # whatever happens next
    failed = [section.name for section in sections if section.error is not None]
    wrong = [f"{section.name}: {name}" for section in sections for name in section.wrong]
    print(f"{found['seconds']:.0f} s; figures are in {config.output}")
    print(f"sections that failed: {', '.join(failed) or 'none'}")
    print("\n  ".join(["wrong figures:", *wrong]) if wrong else "wrong figures: none")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
