"""What an engine is: a way of running a loaded model and its head on prepared inputs."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from prismatic.models.batch import Call
from prismatic.models.contract import ActionHead
from prismatic.models.token_pruner import TokenSelection

ENGINES = ("auto", "eager", "compiled")


def check_engine(name: str) -> None:
    """Raises ValueError listing the engines for an unknown one."""
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is unknown; known: {', '.join(ENGINES)}")


@dataclass
class Parts:
    """What an engine runs. Any of them may be replaced; their weights stay as they are.

    Attributes:
        model: an `OpenVLAForActionPrediction` in evaluation mode.
        action_head: its head.
        proprio_projector: of the state, where it is read.
    """

    model: Any
    action_head: ActionHead
    proprio_projector: nn.Module | None


@dataclass(frozen=True)
class Answer:
    """Attributes:
    predicted: (B, chunk, action_dim) float32 normalised actions, on the model's device.
    selection: the visual tokens that the LLM saw, as `PolicyOutput.selection`.
    """

    predicted: torch.Tensor
    selection: TokenSelection


class Engine(Protocol):
    """Runs under `torch.inference_mode`; several threads may call it at once."""

    def answer(self, batch: Mapping[str, torch.Tensor], call: Call) -> Answer:
        """Actions for a collated batch in the host's memory; samples do not influence each other."""

    def warming_up(self) -> AbstractContextManager[None]:
        """What is answered inside is nothing that was really seen."""

    def describe(self) -> dict[str, Any]:
        """What runs in truth, for `Policy.description()`: its `name`, and what it chose or why it is not another."""


@dataclass(frozen=True)
class EagerEngine:
    """The model's modules as they stand, one operation after the other: what other engines are compared with."""

    parts: Parts

    def answer(self, batch: Mapping[str, torch.Tensor], call: Call) -> Answer:
        """As `Engine.answer`."""
        parts, device = self.parts, self.parts.model.device
        proprio = batch["proprio"].to(device) if "proprio" in batch else None
        encoded = parts.model.encode(
            batch["input_ids"].to(device), batch["attention_mask"].to(device), batch["pixel_values"].to(device),
            proprio, parts.proprio_projector, call,
        )  # fmt: skip
        seeds: Sequence[int] | None = call.seeds
        predicted, hidden = parts.action_head.predict(parts.model, encoded, seeds)
        return Answer(predicted, hidden.selection)

    def warming_up(self) -> AbstractContextManager[None]:
        """As `Engine.warming_up`."""
        return nullcontext()

    def describe(self) -> dict[str, Any]:
        """As `Engine.describe`."""
        return {"name": "eager"}
