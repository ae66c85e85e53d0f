"""What a run's checkpoints take on the disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from prismatic.models import film, lora
from prismatic.models.precision import stored_dtype
from prismatic.training.config import FinetuneConfig
from prismatic.training.parts import Parts
from prismatic.training.planning.memory import nbytes
from prismatic.training.runs.folder import RunFolder


def gigabytes(size: int) -> str:
    """For people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class DiskPlan:
    """Bytes in the folder of runs.

    Attributes:
        checkpoint: of one checkpoint.
        written: checkpoints that the run still writes by `--save_freq`.
        stored: of them, how many there are at once at most.
        free: bytes that are free there.
        folder: where.
    """

    checkpoint: int
    written: int
    stored: int
    free: int
    folder: Path

    @property
    def needed(self) -> int:
        """Bytes of all that are there at once."""
        return self.checkpoint * self.stored

    def check(self) -> None:
        """Raises ValueError where the disk is too small."""
        if self.needed > self.free:
            raise ValueError(
                f"the run's {self.stored} checkpoints of {gigabytes(self.checkpoint)} take {gigabytes(self.needed)}, "
                f"and {self.folder} has {gigabytes(self.free)} free: keep fewer (--keep_last n, "
                "--save_latest_checkpoint_only True), save more rarely (--save_freq), save adapters alone "
                "(--merge_lora_during_training False), or choose another --run_root_dir"
            )


def plan_disk(config: FinetuneConfig, parts: Parts, state: int, done: int) -> DiskPlan:
    """Behind step `done`, with a training state of `state` bytes."""
    folder = next(path for path in (config.run_dir.absolute(), *config.run_dir.absolute().parents) if path.is_dir())
    free, there = shutil.disk_usage(folder).free, 0
    if config.keep_last or config.save_latest_checkpoint_only:  # those that are there are among the ones to be kept
        run = RunFolder(config.run_dir)
        own = [saved for saved in run.saved().values() if saved.parent == run.checkpoints]
        there = len(own)
        free += sum(file.stat().st_size for saved in own for file in saved.rglob("*") if file.is_file())
    return DiskPlan(checkpoint_bytes(config, parts, state), *count_checkpoints(config, done, there), free, folder)


def count_checkpoints(config: FinetuneConfig, done: int = 0, there: int = 0) -> tuple[int, int]:
    """Checkpoints that are written behind step `done` by `--save_freq`, and those that are there at once at most.

    Where only some are kept, the `there` of before count among them.
    """
    steps = range(done + 1, config.max_steps + 1)
    written = sum(step % config.save_freq == 0 or step == config.max_steps for step in steps)
    if not (last := 1 if config.save_latest_checkpoint_only else config.keep_last):
        return written, written
    return written, min(there + written, last + 1 + config.keep_best)  # the next is written before the oldest goes


def checkpoint_bytes(config: FinetuneConfig, parts: Parts, state: int) -> int:
    """Of one checkpoint's files.

    Args:
        config: the flags.
        parts: on the meta device.
        state: bytes of what `training_state/` holds.
    """
    checkpoint = parts.checkpoint
    model, stored = checkpoint.model, stored_dtype(checkpoint.config_json)
    total = state + sum(
        nbytes(part.state_dict().values())
        for part in (checkpoint.action_head, checkpoint.proprio_projector)
        if part is not None
    )
    if parts.lora is not None:
        names = (name for name in parts.trained if ".lora_" in name or name.startswith("model.pruner."))
        total += nbytes(parts.trained[name] for name in names)
    if parts.lora is None or config.merge_lora_during_training:
        with torch.device("meta"):
            weights = {
                name: torch.empty(value.shape, dtype=value.dtype if film.is_film(name) else stored)
                for name, value in lora.merged_weights(model).items()
            }
            component: dict[str, torch.Tensor] = {}
            if film.has_film(model.vision_backbone):
                weights, component = film.split_state(weights)
        total += nbytes(weights.values()) + nbytes(component.values())
    return total + sum(map(len, checkpoint.processor_files.values()))
