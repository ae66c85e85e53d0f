"""Seconds and memory of saving a model with adapters, merged and not, and of merging an adapter afterwards.

    python scripts/dev/measure_saving.py --checkpoint FOLDER --output_dir EMPTY

Needs the checkpoint's size twice on the disk of `--output_dir`, which is removed at the end. Told are the memory that
comes on top of the loaded model's, both what the process owns (anonymous) and with pages of files that it has mapped,
which the system takes back when it needs them.
"""

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `scripts` is no installed package

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.files import check_complete
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.checkpoints.weight_files import fingerprint
from prismatic.command_line import parse_or_exit
from prismatic.models import lora

EVERY_S = 0.01


@dataclass
class MeasureConfig:
    """What to measure."""

    checkpoint: Path  # folder of a model
    output_dir: Path  # where to write; removed at the end
    lora_rank: int = 32  # of the adapters


class Memory(threading.Thread):
    """Watches a process; `peak` are the most bytes so far: anonymous, and all."""

    def __init__(self, pid: int | str = "self") -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.peak = self.now()
        self.done = threading.Event()

    def now(self) -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in self.status.read_text().splitlines())
        anonymous, whole = (int(lines.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
        return anonymous, whole

    def run(self) -> None:
        while not self.done.wait(EVERY_S):
            try:
                now = self.now()
            except OSError:  # the process has ended
                return
            self.peak = (max(self.peak[0], now[0]), max(self.peak[1], now[1]))


@contextmanager
def measured(console: Console, what: str) -> Iterator[None]:
    """Tells seconds, and memory above what there was before."""
    memory = Memory()
    before, began, began_cpu = memory.peak, time.perf_counter(), time.process_time()
    memory.start()
    yield
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    memory.done.set()
    memory.join()
    above = [(peak - start) / 1e9 for peak, start in zip(memory.peak, before, strict=True)]
    console.print(
        f"{what}: {seconds:.1f} s ({cpu:.1f} s of computing), {above[0]:.2f} GB above ({above[1]:.2f} GB with mapped "
        "files)",
        soft_wrap=True,
    )


def save(config: MeasureConfig, console: Console) -> None:
    """Save merged weights, then the adapter alone."""
    checkpoint = load_checkpoint(config.checkpoint, LoadOptions(dtype=torch.bfloat16))
    adapters = lora.attach_lora(checkpoint.model, config.lora_rank)
    trained = {name: value.detach() for name, value in checkpoint.model.named_parameters() if value.requires_grad}
    for name, value in trained.items():
        if "lora_B" in name:
            value.normal_(std=0.01)
    moments = {name: {key: torch.zeros_like(value) for key in ("mean", "square")} for name, value in trained.items()}
    state = {"step": 1, "parameters": trained, "optimizer": moments}
    anonymous, whole = (value / 1e9 for value in Memory().peak)
    values = sum(value.numel() for value in trained.values()) / 1e6
    console.print(f"loaded, {values:.1f} M trained: {anonymous:.2f} GB ({whole:.2f} GB with mapped files)")

    base = fingerprint(check_complete(config.checkpoint))

    def adapter(folder: Path) -> None:
        lora.save_adapter(checkpoint.model, adapters, folder / lora.FOLDER, str(config.checkpoint), base)

    with measured(console, "saving, merged"):
        weights = lora.merged_weights(checkpoint.model)
        save_checkpoint(config.output_dir / "merged", checkpoint, 1, weights, training_state=state, extra=adapter)
    rmtree(config.output_dir / "merged")
    with measured(console, "saving the adapter alone"):
        save_checkpoint(config.output_dir / "adapter", checkpoint, 1, {}, training_state=state, extra=adapter)


def merge(config: MeasureConfig, console: Console) -> None:
    """Merge that adapter, in a process of its own."""
    adapter = str(config.output_dir / "adapter")
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lightvla", "merge", "--lora_finetuned_checkpoint_dir", adapter], cwd=ROOT
    )
    memory = Memory(process.pid)
    memory.start()
    if process.wait():
        sys.exit(f"merging ended with {process.returncode}")
    anonymous, whole = (value / 1e9 for value in memory.peak)
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    console.print(
        f"merging: {seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of computing), {anonymous:.2f} GB in all "
        f"({whole:.2f} GB with mapped files)",
        soft_wrap=True,
    )


def main(config: MeasureConfig) -> None:
    """Measure one after the other."""
    try:
        save(config, Console())
        merge(config, Console())
    finally:
        rmtree(config.output_dir, ignore_errors=True)


if __name__ == "__main__":
    main(parse_or_exit(MeasureConfig))
