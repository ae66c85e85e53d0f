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

from prismatic.checkpoints.components import component_states, on_host
from prismatic.checkpoints.directory import Checkpoint
from prismatic.checkpoints.places import BEST, LATEST
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.lazy_tensors import named_tensors
from prismatic.machine import read_machine
from prismatic.models import lora
from prismatic.models.film import is_film
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.ema import WeightAverage
from prismatic.training.parallel.shards import gathered, part_like
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
            parameter.copy_(part_like(state["parameters"][name], parameter))
        settings = self.optimizer.state_dict()["param_groups"]  # rates, betas and decay are this run's flags
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            # Copies: a mapped file that is removed would keep its room on the disk.
            number: {key: part_like(value, parameters[number]).clone() for key, value in moment.items()}
            for number, moment in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": settings})
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


@dataclass
class _Content:
    """What a checkpoint is written from, beside what does not change.

    Attributes:
        state: `Training.state_dict`.
        parts: of head and projectors, with averaged weights.
        frozen: of the model, where its own tensors are not whole.
    """

    state: dict[str, Any]
    parts: dict[str, dict[str, torch.Tensor]]
    frozen: dict[str, torch.Tensor]


class Saver:
    """Decides when checkpoints are due and writes them, behind the training where that fits into memory.

    The main process alone writes; the others give it their share of what is divided among them.
    """

    def __init__(self, training: Training, config: FinetuneConfig, ranks: Ranks) -> None:
        self.training = training
        self.config = config
        self.ranks = ranks
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

        All processes call it.

        Raises:
            OSError: where the disk has no room for it, or cannot be written to; of this save or the one before.
            FloatingPointError: for what is not finite. The checkpoints that there were are as they were.
            ElsewhereError: in the other processes then.
        """
        ranks, step = self.ranks, self.training.step
        with ranks.together(OSError, FloatingPointError):
            self.writer.wait()
        if self._last_step == step:
            return
        content = self._shared_content() if self._is_shared else None
        with ranks.together(OSError, FloatingPointError):
            if ranks.is_main:
                background = not wait and self._fits_memory()
                self.writer.start(self._prepared(content or self._content(background), validation_loss))
                if not background:
                    self.writer.wait()
        self._last_step, self._last_time = step, time.monotonic()

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
        if self._is_shared:
            return True  # it has been copied
        free = read_machine().memory_bytes
        state = self.training.state_dict(self.config)
        return free is None or sum(tensor.nbytes for _, tensor in named_tensors(state)) < _SHARE_OF_MEMORY * free

    @property
    def _is_shared(self) -> bool:
        return self.config.sharding != "none"

    @property
    def _merges(self) -> bool:
        """Whether checkpoints hold all weights: else those of the base stay where `base` says until merging."""
        return self.training.lora is None or self.config.merge_lora_during_training

    def _parts(self) -> dict[str, dict[str, torch.Tensor]]:
        checkpoint = self.training.checkpoint
        return component_states(checkpoint.action_head, checkpoint.proprio_projector)

    def _content(self, background: bool) -> "_Content":
        """What a checkpoint holds of a run whose tensors are whole here; for the background, copies."""
        training = self.training
        state = training.state_dict(self.config)
        with training.average.applied() if training.average else nullcontext():
            parts = on_host(self._parts())
        if background:
            state, parts = self._copy({"state": state, "parts": parts}).values()
            if training.device.type == "cuda":
                torch.cuda.synchronize()
        return _Content(state, parts, {})

    def _shared_content(self) -> "_Content":
        """The same where tensors are divided among the processes, which all call it: whole copies, on the main one."""
        training, keep = self.training, self.ranks.is_main
        state = gathered(training.state_dict(self.config), keep)
        with training.average.applied() if training.average else nullcontext():
            parts = gathered(self._parts(), keep)
        weights = training.checkpoint.model.state_dict() if self._merges else {}
        frozen = {name: value for name, value in weights.items() if f"model.{name}" not in training.trained}
        return _Content(state, parts, gathered(frozen, keep))

    def _prepared(self, content: "_Content", validation_loss: float | None) -> Callable[[], None]:
        """What writes the checkpoint, on whatever thread."""
        training, config = self.training, self.config
        state, checkpoint = content.state, training.checkpoint
        own = {
            name.removeprefix("model."): value
            for name, value in (state["average"] or state["parameters"]).items()
            if name.startswith("model.")
        }
        merged = lora.merged_weights(checkpoint.model, {**content.frozen, **own}) if self._merges else {}
        weights = {
            # FiLM's maps are published in float32
            name: value if is_film(name) else value.to(training.stored_dtype)
            for name, value in merged.items()
        }
        self._make_room(sum(value.nbytes for value in weights.values()), state)
        target = self.folder.checkpoint_dir(training.step)
        suffix = LATEST if config.save_latest_checkpoint_only else training.step
        facts = {} if validation_loss is None else {"validation_loss": validation_loss}
        adapter = partial(self._write_adapter, own) if training.lora is not None else None

        def write() -> None:
            with _side_stream(training.device):
                self.folder.set_aside(target)
                save_checkpoint(target, checkpoint, suffix, weights, state, adapter, facts, content.parts)
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
