"""Checkpoints of a run: writing them, finding them again, and continuing exactly where one was written."""

import logging
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from prismatic.checkpoints.directory import Checkpoint
from prismatic.checkpoints.saving import load_training_state, save_checkpoint
from prismatic.models import lora
from prismatic.models.film import is_film
from prismatic.training.config import FinetuneConfig
from prismatic.training.ema import WeightAverage

log = logging.getLogger(__name__)

LATEST = "latest"
MUST_MATCH = (
    "dataset_name",
    "gripper",
    "pruner",
    "use_lora",
    "merge_lora_during_training",
    "lora_rank",
    "use_proprio",
    "use_l1_regression",
    "use_diffusion",
    "num_diffusion_steps_train",
    "use_film",
    "num_images_in_input",
    "seed",
)
"""Flags that a resumed run must share with the one it continues."""


@dataclass
class Training:
    """What a run changes as it goes, and so what survives in a checkpoint.

    Attributes:
        checkpoint: model, head, projector and processor, as `save_checkpoint` takes them.
        trained: name -> trained parameter (float32).
        optimizer: its state covers `trained`.
        average: moving average of `trained`, or None.
        lora: how adapters were attached, or None.
        base: checkpoint that the frozen weights came from.
        stored_dtype: of the weights in checkpoints.
        step: finished optimiser steps.
        position: samples that all processes together have seen.
    """

    checkpoint: Checkpoint
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    lora: LoraConfig | None
    base: str
    stored_dtype: torch.dtype
    step: int = 0
    position: int = 0

    def state_dict(self, config: FinetuneConfig) -> dict[str, Any]:
        """Plain data and CPU tensors for `training_state/`."""
        return {
            "step": self.step,
            "position": self.position,
            "base": self.base,
            "base_fingerprint": self.checkpoint.model.config.base_fingerprint,
            "flags": {name: getattr(config, name) for name in MUST_MATCH},
            "parameters": {name: parameter.detach().cpu() for name, parameter in self.trained.items()},
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`'s answer. Raises ValueError if it belongs to other parameters."""
        if set(state["parameters"]) != set(self.trained):
            odd = sorted(set(state["parameters"]) ^ set(self.trained))
            raise ValueError(f"the training state holds other parameters than this model trains, e.g. {odd[0]!r}")
        for name, parameter in self.trained.items():
            parameter.copy_(state["parameters"][name])
        settings = self.optimizer.state_dict()["param_groups"]  # rates, betas and decay are this run's flags
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": settings})
        if self.average is not None:
            self.average.load_state_dict(state["average"] or state["parameters"])
        self.step, self.position = state["step"], state["position"]


def save(training: Training, config: FinetuneConfig) -> Path:
    """Write the checkpoint of the finished step; the main process only. Averaged weights are saved where there are."""
    target = config.checkpoint_dir(training.step)
    suffix = LATEST if config.save_latest_checkpoint_only else training.step
    state = training.state_dict(config)  # the raw weights, hence before the average is put in their place
    model = training.checkpoint.model
    adapter = partial(_write_adapter, training) if training.lora is not None else None
    merge = training.lora is None or config.merge_lora_during_training
    with training.average.applied() if training.average else nullcontext():
        # Without merging, the base weights stay where `base` says until the adapter is merged.
        weights = lora.merged_weights(model) if merge else {}
        weights = {
            # FiLM's maps are published in float32
            name: value if is_film(name) else value.to(training.stored_dtype)
            for name, value in weights.items()
        }
        save_checkpoint(target, training.checkpoint, suffix, weights, state, adapter)
    log.info("saved step %d to %s", training.step, target)
    if config.save_latest_checkpoint_only:
        for step, folder in saved_checkpoints(config).items():
            if step not in (LATEST, str(training.step)):
                shutil.rmtree(folder)
    return target


def _write_adapter(training: Training, folder: Path) -> None:
    assert training.lora is not None
    model = training.checkpoint.model
    fingerprint = model.config.base_fingerprint
    lora.save_adapter(model, training.lora, folder / lora.FOLDER, training.base, fingerprint)


def saved_checkpoints(config: FinetuneConfig) -> dict[str, Path]:
    """The checkpoints of this run that exist: step (or `latest`) -> folder, newest last."""
    pattern = re.compile(re.escape(config.run_dir.name) + r"--(\d+)_chkpt")
    matches = [(pattern.fullmatch(path.name), path) for path in config.run_dir.parent.glob("*_chkpt")]
    found = {int(match.group(1)): path for match, path in matches if match and (path / "config.json").is_file()}
    named = {str(step): found[step] for step in sorted(found)}
    if (config.run_dir / "config.json").is_file():
        named[LATEST] = config.run_dir
    return named


def find_resumable(config: FinetuneConfig) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `--resume` means, and its training state.

    That is `vla_path` if it holds a training state, else the newest of the run, or the one of `resume_step`.

    Raises:
        FileNotFoundError: if there is none, or none of that step; names those that there are.
        ValueError: if flags differ from the run's in a way that cannot be continued.
    """
    saved = saved_checkpoints(config)
    if (Path(config.vla_path) / "training_state").is_dir():
        folder = Path(config.vla_path)
    elif config.resume_step is not None and str(config.resume_step) in saved:
        folder = saved[str(config.resume_step)]
    elif saved:
        folder = _newest(saved)
    else:
        raise FileNotFoundError(
            f"--resume True: neither {config.vla_path} nor a checkpoint of run {config.run_id!r} below "
            f"{config.run_root_dir} holds a training state; pass the flags of the run that should go on"
        )
    state = load_training_state(folder)
    if config.resume_step not in (None, state["step"]):
        raise FileNotFoundError(
            f"--resume_step {config.resume_step}: {folder} is at step {state['step']}; this run has checkpoints "
            f"{', '.join(saved) or 'none'}"
        )
    for name, value in state["flags"].items():
        if getattr(config, name) != value and not (name == "lora_rank" and not config.use_lora):
            raise ValueError(f"--{name} {getattr(config, name)}: the run that is resumed had {value}; pass that")
    if state["step"] >= config.max_steps:
        raise ValueError(f"{folder} is at step {state['step']} already; to go on pass --max_steps above that")
    return folder, state


def _newest(saved: Mapping[str, Path]) -> Path:
    """The latest-only checkpoint and numbered ones may both exist: the higher step wins."""
    numbered = [name for name in saved if name != LATEST]
    if LATEST in saved and (not numbered or load_training_state(saved[LATEST])["step"] >= int(numbered[-1])):
        return saved[LATEST]
    return saved[numbered[-1]]
