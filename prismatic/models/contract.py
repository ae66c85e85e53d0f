"""The contract between a model and its action head: what either asks of the other.

A head gets the model and an encoded batch, not hidden rows, because some heads need more than one pass of the LLM.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from prismatic.libraries import LlamaForCausalLM
from prismatic.models.batch import ActionHidden, EncodedBatch
from prismatic.models.projectors import VisionProjector
from prismatic.models.sites import Site
from prismatic.models.vision_backbone import PrismaticVisionBackbone
from prismatic.vla.robots import RobotSpec


class ActionModel(Protocol):
    """What heads need of a model, and whoever counts what a policy query costs; `OpenVLAForActionPrediction` is one.

    Attributes:
        pruner: prunes at `site`.
        num_images_in_input: per sample.
    """

    vision_backbone: PrismaticVisionBackbone
    projector: VisionProjector
    language_model: LlamaForCausalLM
    pruner: nn.Module
    robot: RobotSpec
    num_images_in_input: int

    @property
    def site(self) -> Site:
        """Where tokens are dropped."""

    @property
    def num_visual_tokens(self) -> int:
        """Of one sample, before pruning."""

    def run(
        self,
        encoded: EncodedBatch,
        mask_padding: bool = True,
        action_tokens: torch.Tensor | None = None,
        timestep_token: torch.Tensor | None = None,
        further_rows: int = 0,
    ) -> ActionHidden:
        """One pass of the LLM: the hidden rows that predict the actions."""

    def decode(self, encoded: EncodedBatch, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, ActionHidden]:
        """Tokens one after another: ids (B, num_tokens), their logits, and the rows they were read from."""


@dataclass
class HeadLoss:
    """What a head says about a training batch.

    Attributes:
        loss: (), with gradient.
        predicted: (B, chunk, action_dim) normalised actions, for metrics.
        hidden: where they were read.
    """

    loss: torch.Tensor
    predicted: torch.Tensor
    hidden: ActionHidden


class ActionHead(Protocol):
    """What inference and training need of a head, which is an `nn.Module` too.

    Attributes:
        kind: "l1", "diffusion", "discrete" or "autoregressive".
    """

    kind: str

    def loss(self, model: ActionModel, encoded: EncodedBatch, batch: Mapping[str, torch.Tensor]) -> HeadLoss:
        """The loss of a batch that brings `actions` (B, chunk, action_dim) and what else the kind needs."""

    def predict(
        self, model: ActionModel, encoded: EncodedBatch, seeds: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, ActionHidden]:
        """Normalised actions (B, chunk, action_dim) float32 and what they were read from; `seeds` one per sample."""

    def eval(self) -> object:
        """Inference from now on, as of every `nn.Module`."""

    def modules(self) -> Iterator[nn.Module]:
        """Itself and its parts, as of every `nn.Module`."""

    def state_dict(self) -> dict[str, Any]:
        """Name -> tensor, as of every `nn.Module`."""
