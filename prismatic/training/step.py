"""One training step's computation: what is trained, the loss, the optimiser."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.batch import Call, EncodedBatch
from prismatic.models.contract import ActionHead
from prismatic.models.llama import share_casts
from prismatic.models.lora import has_lora, unused_modules
from prismatic.models.projectors import ProprioProjector
from prismatic.models.token_pruner import TokenSelection
from prismatic.training.config import FinetuneConfig
from prismatic.training.schedules import decay_factor, warmup_factor

_DROPOUT_STREAM = 8  # apart from the random numbers of order, images, states, noise, heads, mixtures and substitutes


@dataclass
class StepMetrics:
    """What one batch says, on the model's device and without gradient.

    Attributes:
        loss: (), the action head's.
        current_l1: (), mean absolute error of the chunk's first action, over normalised values.
        next_l1: () of the others.
        kept: (B, I) visual tokens that stay, per sample and image.
        l1_dimensions: (2, A) `current_l1` and `next_l1` of every action dimension.
    """

    loss: torch.Tensor
    current_l1: torch.Tensor
    next_l1: torch.Tensor
    kept: torch.Tensor
    l1_dimensions: torch.Tensor


class TrainableVLA(nn.Module):
    """Everything that is trained, as one module: the forward pass is the loss.

    Args:
        model: runs the policy.
        action_head: L1, diffusion or discrete head.
        proprio_projector: state -> token, or None where the model does not read the state.
        bf16: compute under bfloat16 autocast; weights stay as they are.
    """

    action_head: ActionHead

    def __init__(
        self,
        model: OpenVLAForActionPrediction,
        action_head: ActionHead,
        proprio_projector: ProprioProjector | None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.action_head = action_head
        self.proprio_projector = proprio_projector
        self.bf16 = bf16
        if bf16:
            share_casts(model.language_model.model)

    def forward(self, batch: Mapping[str, Any], noise: torch.Tensor | None = None) -> tuple[torch.Tensor, StepMetrics]:
        """Loss and metrics of one collated batch; `noise` (B, Q, V) is added to the pruner's scores when training."""
        device_type = batch["pixel_values"].device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.bf16):
            outcome = self.action_head.loss(self.model, self._encode(batch, Call(noise)), batch)
        with torch.no_grad():
            error = (outcome.predicted - batch["actions"].to(outcome.predicted.dtype)).abs()
            images = batch["pixel_values"].shape[1] // self.model.vision_backbone.channels_per_image
            kept = outcome.hidden.selection.kept().unflatten(1, (images, -1)).sum(-1)
            further = error[:, 1:] if error.shape[1] > 1 else error
            by_dimension = torch.stack((error[:, 0].mean(0), further.mean((0, 1))))
            l1 = by_dimension.mean(1)
            metrics = StepMetrics(outcome.loss.detach(), l1[0], l1[1], kept, by_dimension)
        return outcome.loss, metrics

    def sampled_l1(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean absolute error () of the actions that inference would return for this batch."""
        predicted, _ = self.predict(batch)
        return (predicted - batch["actions"].to(predicted.dtype)).abs().mean()

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any], call: Call | None = None) -> tuple[torch.Tensor, TokenSelection]:
        """As inference computes it: normalised actions (B, chunk, action_dim) and the visual tokens that stay.

        Nothing is drawn from torch's generator where `call` has seeds. Modules stay in the mode that they were in.
        """
        was_training = self.training
        self.eval()
        with torch.autocast(batch["pixel_values"].device.type, torch.bfloat16, enabled=self.bf16):
            encoded = self._encode(batch, call or Call())
            predicted, hidden = self.action_head.predict(self.model, encoded, encoded.call.seeds)
        self.train(was_training)
        return predicted, hidden.selection

    def _encode(self, batch: Mapping[str, Any], call: Call) -> EncodedBatch:
        return self.model.encode(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            proprio=batch["proprio"] if self.proprio_projector is not None else None,
            proprio_projector=self.proprio_projector,
            call=call,
        )


def choose_trained(module: TrainableVLA, in_float32: bool = True) -> dict[str, nn.Parameter]:
    """Mark what is trained, make it float32 (unless somebody else will), and return it by name.

    With adapters attached: those, the pruner, the action head and the projector. Without: everything that actions
    depend on.
    Parameters without influence stay frozen, so every trained one gets a gradient in every step.
    """
    if not has_lora(module.model):
        module.model.requires_grad_(True)
        for part in unused_modules(module.model):
            part.requires_grad_(False)
    module.model.pruner.requires_grad_(True)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for parameter in trained.values() if in_float32 else ():
        # Small updates vanish in bfloat16 weights; autocast still computes in bfloat16. A copy in any case: what was
        # loaded may be the checkpoint's file, mapped into memory.
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return trained


def make_optimizer(trained: Mapping[str, nn.Parameter], config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (biases, norms, scales) do not."""
    matrices = [parameter for parameter in trained.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in trained.values() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW([group for group in groups if group["params"]], config.learning_rate, betas, fused=True)


def learning_rate(config: FinetuneConfig, step: int, schedule_steps: int) -> float:
    """The rate of step `step` (0, 1, ...); a cosine ends at `schedule_steps`."""
    decay = decay_factor(step, config.lr_schedule, schedule_steps, config.num_steps_before_decay)
    return config.learning_rate * warmup_factor(step, config.lr_warmup_steps) * decay


def seed_dropout(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed torch's generators, on all devices, for one micro-step of one process.

    Dropout is then a function of these numbers, so a resumed run needs no generator's state.
    """
    words = np.random.SeedSequence([seed, step, micro_step, rank, _DROPOUT_STREAM]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
