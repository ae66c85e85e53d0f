"""Time and memory of a LoRA step at the sizes of a 7B policy, as `vla-scripts/finetune.py` computes it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prismatic.benchmark.fixed_tokens import forced_picks
from prismatic.models.lora import attach_lora
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner
from prismatic.training.config import FinetuneConfig
from prismatic.training.step import TrainableVLA, choose_trained, make_optimizer
from scripts.dev.gpu_figures import Section, allocated_gb, fits, free_memory, quantile, synchronize
from scripts.dev.gpu_model import Card, Parts

RANK = 32
FORMS = ("none", "compact", "duplicated")


@dataclass
class Training:
    """Everything that a step needs, with adapters on frozen bfloat16 weights."""

    parts: Parts
    module: TrainableVLA
    optimizer: torch.optim.AdamW
    trained: dict[str, torch.nn.Parameter]

    @classmethod
    def build(cls, parts: Parts) -> "Training":
        """Attaches the adapters in place."""
        attach_lora(parts.model, RANK)
        module = TrainableVLA(parts.model, parts.head, parts.projector, bf16=True).train()
        trained = choose_trained(module)
        return cls(parts, module, make_optimizer(trained, FinetuneConfig()), trained)

    def choose(self, form: str) -> None:
        """How tokens are kept: `none` keeps all, the others are LightVLA's two forms of training."""
        self.parts.model.pruner = (
            KeepAllTokens() if form == "none" else TokenPruner("weighted", form == "compact").train()
        )

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """As it is collated, with actions to learn."""
        robot = self.parts.model.robot
        generator = torch.Generator().manual_seed(1)
        actions = torch.rand(size, robot.chunk_length, robot.action_dim, generator=generator) * 2 - 1
        return {**self.parts.batch(size), "actions": actions.to(self.parts.device)}

    def noise(self, form: str, size: int, kept: int) -> torch.Tensor | None:
        """(B, V, V) under which both of LightVLA's forms pick the same `kept` tokens, as few as after training."""
        if form == "none":
            return None
        return forced_picks(kept, self.parts.model.num_visual_tokens, self.parts.device).expand(size, -1, -1)


def train(section: Section, card: Card) -> None:
    """Steps of every form and batch size; the longest batch unpruned once more with activations computed anew."""
    parts = card.parts()
    card.drop()  # adapters stay in it
    section.tell("weights", allocated_gb(), "GB")
    training = Training.build(parts)
    numbers = sum(parameter.numel() for parameter in training.trained.values())
    section.tell("trained parameters", numbers / 1e6, "10^6")
    section.tell("weights with adapters, head in float32", allocated_gb(), "GB")
    section.tell("optimiser's state, by its sizes", 8 * numbers / 1e9, "GB")
    section.tell("gradients, by their sizes", 4 * numbers / 1e9, "GB")
    section.attempt(partial(_tell_forms, section, training, card))
    losses: dict[str, float] = {}
    for size in card.preset.train_batches:
        for form in FORMS:
            losses |= _measure(section, training, card, form, size, f"{form}, batch {size}")
    size = max(card.preset.train_batches)
    training.parts.model.enable_gradient_checkpointing()
    losses |= _measure(section, training, card, "none", size, f"none, batch {size}, gradient checkpointing")
    finite = all(abs(loss) < float("inf") for loss in losses.values())
    section.test("losses of all forms are finite", finite, "True", finite)


@torch.no_grad()
def _tell_forms(section: Section, training: Training, card: Card) -> None:
    """How far apart the losses of LightVLA's two forms are before any step; equal but for rounding."""
    batch, losses = training.batch(1), []
    for form in ("compact", "duplicated"):
        training.choose(form)
        losses.append(training.module(batch, training.noise(form, 1, card.preset.kept))[0].item())
    section.tell("losses of both forms apart by, relative", abs(losses[0] / losses[1] - 1), at_most=0.05)


def _measure(section: Section, training: Training, card: Card, form: str, size: int, name: str) -> dict[str, float]:
    """Time by part, memory and loss of one form; the losses of its steps' last, or nothing where memory is short."""
    losses: dict[str, float] = {}

    def work() -> None:
        losses[name] = _steps(section, training, card, form, size, name)

    section.attempt(lambda: fits(section, name, work))
    if not losses:  # what a step that broke off has left
        training.optimizer.zero_grad(set_to_none=True)
        free_memory()
    return losses


def _steps(section: Section, training: Training, card: Card, form: str, size: int, name: str) -> float:
    training.choose(form)
    batch, noise = training.batch(size), training.noise(form, size, card.preset.kept)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "optimiser": [], "whole": []}
    free_memory()
    before, activations = allocated_gb(), 0.0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    kept, loss = 0.0, torch.tensor(0.0)
    for step in range(card.preset.steps + 1):  # the first is not measured
        began = time.perf_counter()
        (loss, metrics), forward = _timed(lambda: training.module(batch, noise))
        activations = allocated_gb() - before if step == 0 else activations
        _, backward = _timed(loss.backward)
        _, update = _timed(_update(training.optimizer))
        kept = float(metrics.kept.sum(1).float().mean())
        whole = 1e3 * (time.perf_counter() - began)
        if step > 0:
            for part, milliseconds in zip(times, (forward, backward, update, whole), strict=True):
                times[part].append(milliseconds)
    section.tell(f"{name}, tokens kept", kept)
    for part, found in times.items():
        section.tell(f"{name}, {part}", quantile(sorted(found), 0.5), "ms")
    if torch.cuda.is_available():
        section.tell(f"{name}, activations after forward", activations, "GB")
        section.tell(f"{name}, peak", torch.cuda.max_memory_allocated() / 1e9, "GB")
    section.tell(f"{name}, loss", loss.item())
    return loss.item()


def _update(optimizer: torch.optim.AdamW) -> Callable[[], None]:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns, and its milliseconds until the GPU has done it."""
    synchronize()
    began = time.perf_counter()
    found = work()
    synchronize()
    return found, 1e3 * (time.perf_counter() - began)
