"""What of a run survives: its state, copied in a moment, and the checkpoint that is written from that copy."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from prismatic.checkpoints.components import component_states
from prismatic.checkpoints.directory import Checkpoint
from prismatic.checkpoints.places import BEST, LATEST
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.lazy_tensors import named_tensors
from prismatic.machine import read_machine
from prismatic.models import lora
from prismatic.models.film import is_film
from prismatic.training.config import FinetuneConfig
from prismatic.training.ema import WeightAverage
from prismatic.training.runs.folder import RunFolder
from prismatic.training.runs.identity import plain_flags
from prismatic.training.runs.writer import BackgroundWriter

log = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.5
"""Of the memory that is free on the host a copy in the background may take so much."""


@dataclass
class Facts:
    """What a run is trained on and how it began, whatever the flags of the command that goes on with it.

    Attributes:
        base: checkpoint that the frozen weights came from: an absolute path, or a hub id.
        base_fingerprint: of its weights; None in processes that do not save.
        data: dataset -> fingerprint.
        schedule_steps: `max_steps` of the first command: length of the schedules of noise and rate.
        samples_per_step: of all processes together.
        computing: dtype and attention that were chosen for speed (`computing.py`).
    """

    base: str
    base_fingerprint: str | None
    data: Mapping[str, str]
    schedule_steps: int
    samples_per_step: int
    computing: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Training:
    """What a run changes as it goes, and so what survives in a checkpoint.

    Attributes:
        checkpoint: model, head, projector and processor, as `save_checkpoint` takes them.
        trained: name -> trained parameter (float32).
        optimizer: its state covers `trained`.
        average: moving average of `trained`, or None.
        lora: how adapters were attached, or None.
        stored_dtype: of the weights in checkpoints.
        facts: what stays as it was when the run began.
        step: finished optimiser steps.
        position: samples that all processes together have seen.
    """

    checkpoint: Checkpoint
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    lora: LoraConfig | None
    stored_dtype: torch.dtype
    facts: Facts
    step: int = 0
    position: int = 0

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return next(iter(self.trained.values())).device

    def state_dict(self, config: FinetuneConfig) -> dict[str, Any]:
        """Plain data and tensors, those of the run itself, for `training_state/`."""
        return {
            "step": self.step,
            "position": self.position,
            **vars(self.facts),
            "flags": plain_flags(config),
            "parameters": {name: parameter.detach() for name, parameter in self.trained.items()},
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


class HostCopy:
    """Copies nested tensors to the host's memory. Buffers are kept for the next time, pinned where a GPU is read."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def __call__(self, content: Any, name: str = "") -> Any:
        """The same dictionaries and lists around copies of their tensors."""
        if isinstance(content, torch.Tensor):
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != content.shape or buffer.dtype != content.dtype:
                buffer = torch.empty(content.shape, dtype=content.dtype, pin_memory=content.is_cuda)
                self._buffers[name] = buffer
            return buffer.copy_(content.detach(), non_blocking=True)
        if isinstance(content, Mapping):
            return {key: self(value, f"{name}.{key}") for key, value in content.items()}
        if isinstance(content, list | tuple):
            return type(content)(self(value, f"{name}.{place}") for place, value in enumerate(content))
        return content


class Saver:
    """Decides when checkpoints are due and writes them, behind the training where that fits into memory.

    The main process alone saves; the others have one, too, that is never asked.
    """

    def __init__(self, training: Training, config: FinetuneConfig) -> None:
        self.training = training
        self.config = config
        self.folder = RunFolder(config.run_dir)
        self.writer = BackgroundWriter()
        self._copy = HostCopy()
        self._last_step = training.step
        self._last_time = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether finished step `step` is one to save, by `--save_freq` or `--save_minutes`."""
        minutes = (time.monotonic() - self._last_time) / 60
        return step % self.config.save_freq == 0 or 0 < self.config.save_minutes <= minutes

    def save(self, validation_loss: float | None = None, wait: bool = False) -> None:
        """Save the finished step, unless that is done; with `wait` the checkpoint is complete afterwards.

        Raises:
            OSError: where the disk has no room for it, or cannot be written to; of this save or the one before.
            FloatingPointError: for what is not finite. The checkpoints that there were are as they were.
        """
        training = self.training
        self.writer.wait()
        if self._last_step != training.step:
            background = not wait and self._fits_memory()
            self.writer.start(self._prepared(validation_loss, background))
            self._last_step, self._last_time = training.step, time.monotonic()
            if not background:
                self.writer.wait()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint before could not be written; the next `save` raises why."""
        return self.writer.failed

    def leave(self) -> None:
        """Wait for a checkpoint that is being written, at the end of a run that ends by an error of its own."""
        try:
            self.writer.wait()
        except (OSError, FloatingPointError) as error:
            log.error("%s", error)

    def _fits_memory(self) -> bool:
        """Whether to write from a copy while training goes on."""
        if self.config.save_in_background != "auto":
            return self.config.save_in_background == "True"
        free = read_machine().memory_bytes
        state = self.training.state_dict(self.config)
        return free is None or sum(tensor.nbytes for _, tensor in named_tensors(state)) < _SHARE_OF_MEMORY * free

    def _prepared(self, validation_loss: float | None, background: bool) -> Callable[[], None]:
        """What writes the checkpoint; for the background what training goes on to change is copied first."""
        training, config = self.training, self.config
        state = training.state_dict(config)
        with training.average.applied() if training.average else nullcontext():
            checkpoint = training.checkpoint
            parts = component_states(checkpoint.action_head, checkpoint.proprio_projector)
        if background:
            state, parts = self._copy({"state": state, "parts": parts}).values()
            if training.device.type == "cuda":
                torch.cuda.synchronize()
        model = checkpoint.model
        own = {
            name.removeprefix("model."): value
            for name, value in (state["average"] or state["parameters"]).items()
            if name.startswith("model.")
        }
        merge = training.lora is None or config.merge_lora_during_training
        # Without merging, the base weights stay where `base` says until the adapter is merged.
        weights = {
            # FiLM's maps are published in float32
            name: value if is_film(name) else value.to(training.stored_dtype)
            for name, value in (lora.merged_weights(model, own) if merge else {}).items()
        }
        self._make_room(sum(value.nbytes for value in weights.values()), state)
        target = self.folder.checkpoint_dir(training.step)
        suffix = LATEST if config.save_latest_checkpoint_only else training.step
        facts = {} if validation_loss is None else {"validation_loss": validation_loss}
        adapter = partial(self._write_adapter, own) if training.lora is not None else None

        def write() -> None:
            with _side_stream(training.device):
                self.folder.set_aside(target)
                save_checkpoint(target, checkpoint, suffix, weights, state, adapter, facts, parts)
                self.folder.point(LATEST, target)
                if config.keep_best and (best := self.folder.best()) is not None:
                    self.folder.point(BEST, best)
            log.info("saved step %d to %s", state["step"], target)

        return write

    def _make_room(self, weight_bytes: int, state: Mapping[str, Any]) -> None:
        needed = weight_bytes + sum(tensor.nbytes for _, tensor in named_tensors(state))
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        self.folder.make_room(
            1 if self.config.save_latest_checkpoint_only else self.config.keep_last, self.config.keep_best
        )
        free = shutil.disk_usage(self.folder.checkpoints).free
        if needed > free:
            raise OSError(
                f"the checkpoint of step {state['step']} takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free "
                f"in {self.folder.path}; make room there, or pass --keep_last 1; the checkpoints before are whole"
            )

    def _write_adapter(self, given: Mapping[str, torch.Tensor], folder: Path) -> None:
        training, facts = self.training, self.training.facts
        assert training.lora is not None
        model = training.checkpoint.model
        lora.save_adapter(model, training.lora, folder / lora.FOLDER, facts.base, facts.base_fingerprint, given)


def _side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU copies of a background thread do not queue behind the training's kernels."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
