"""Actions by denoising: the DDIM head (OpenVLA-OFT, section IV-B; DDIM, arXiv 2010.02502)."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from prismatic.models.action_heads import MLPResNet
from prismatic.models.batch import ActionHidden, EncodedBatch
from prismatic.models.contract import ActionModel, HeadLoss
from prismatic.models.projectors import NoisyActionProjector

NUM_TRAIN_STEPS = 50
"""From clean actions to noise, where nothing says otherwise; OpenVLA-OFT's default."""


def timestep_token(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines, then cosines, of the step at geometrically falling frequencies: (B,) -> (B, 1, dim) float32."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000.0) / (half - 1)))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None]


class _NoisePredictor(nn.Module):
    """Holds the network under its published name."""

    def __init__(self, llm_dim: int, action_dim: int) -> None:
        super().__init__()
        self.mlp_resnet = MLPResNet(llm_dim * action_dim, llm_dim, action_dim)


class DiffusionActionHead(nn.Module):
    """Predicts the noise in noisy actions, and removes it step by step.

    The LLM reads the noisy actions, one token per value, in the places of the action placeholders, and the time step
    behind the robot state. It runs once per step, and the pruner picks anew each time.

    Args:
        llm_dim: width of a hidden row.
        action_dim: length of one action.
        chunk_length: actions predicted at once.
        num_train_steps: steps from clean actions to noise.

    Attributes:
        noisy_action_projector: belongs to the head, but is stored as a component of its own.
        num_inference_steps: LLM passes per prediction.
    """

    kind = "diffusion"

    def __init__(
        self, llm_dim: int, action_dim: int, chunk_length: int, num_train_steps: int = NUM_TRAIN_STEPS
    ) -> None:
        super().__init__()
        try:
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        except ImportError as error:
            raise ImportError("diffusion heads need diffusers: pip install 'lightvla[diffusion]'") from error
        self.llm_dim = llm_dim
        self.action_dim = action_dim
        self.chunk_length = chunk_length
        self.noise_predictor = _NoisePredictor(llm_dim, action_dim)
        self.noisy_action_projector = NoisyActionProjector(llm_dim)
        self.scheduler = DDIMScheduler(num_train_timesteps=num_train_steps, beta_schedule="squaredcos_cap_v2")
        self.num_inference_steps = num_train_steps

    def restore_schedule(self) -> None:
        """Compute the schedule's tables anew: they are no buffers, and without values in a head built on "meta"."""
        self.scheduler = self.scheduler.from_config(self.scheduler.config)

    @property
    def num_train_steps(self) -> int:
        """Steps from clean actions to noise."""
        return int(self.scheduler.config.num_train_timesteps)

    def predict_noise(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, chunk * action_dim, llm_dim) hidden rows -> (B, chunk, action_dim)."""
        network = self.noise_predictor.mlp_resnet
        return network(rows.reshape(len(rows), self.chunk_length, -1).to(network.fc2.weight.dtype))

    def loss(self, model: ActionModel, encoded: EncodedBatch, batch: Mapping[str, torch.Tensor]) -> HeadLoss:
        """Mean squared error of the predicted noise.

        `batch` brings `actions` and `diffusion_noise`, (B, chunk, action_dim) each, and `diffusion_timesteps` (B,).
        The predicted actions are what the one prediction of the noise implies, not the outcome of sampling.
        """
        noise, steps = batch["diffusion_noise"], batch["diffusion_timesteps"]
        noisy = self.scheduler.add_noise(batch["actions"].to(noise.dtype), noise, steps)
        hidden = self._run(model, encoded, noisy, steps)
        predicted = self.predict_noise(hidden.rows)
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        with torch.no_grad():
            kept = self.scheduler.alphas_cumprod.to(noisy)[steps][:, None, None]
            implied = (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt().clamp(min=1e-3)
        return HeadLoss((predicted - noise).square().mean(), implied.clamp(-1, 1), hidden)

    def predict(
        self,
        model: ActionModel,
        encoded: EncodedBatch,
        seeds: Sequence[int] | None = None,
        start_noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ActionHidden]:
        """Sample actions in `num_inference_steps` LLM passes.

        Args:
            model: runs in every pass.
            encoded: its encoded batch.
            seeds: one per sample, of its starting noise; None draws with torch's CPU generator.
            start_noise: (B, chunk, action_dim), takes the place of drawing.

        Returns:
            Normalised actions (B, chunk, action_dim) float32, and the `ActionHidden` of the last pass.
        """
        shape = (len(encoded.input_ids), self.chunk_length, self.action_dim)
        device = encoded.input_ids.device
        if start_noise is None and seeds is not None:
            start_noise = torch.stack(
                [torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            )
        actions = (torch.randn(shape) if start_noise is None else start_noise).to(device, torch.float32)
        self.scheduler.set_timesteps(self.num_inference_steps)
        for number, step in enumerate(self.scheduler.timesteps.to(device)):
            hidden = self._run(model, encoded.of_pass(number), actions, step.expand(shape[0]))
            noise = self.predict_noise(hidden.rows).float()
            actions = self.scheduler.step(noise, step, actions).prev_sample
        return actions, hidden

    def _run(self, model: ActionModel, encoded: EncodedBatch, noisy: torch.Tensor, steps: torch.Tensor) -> ActionHidden:
        tokens = self.noisy_action_projector(noisy.reshape(len(noisy), -1, 1))
        return model.run(encoded, action_tokens=tokens, timestep_token=timestep_token(steps, self.llm_dim))

    def with_projector(self, projector: nn.Module) -> "DiffusionActionHead":
        """This head, sharing its parts, over another projector of noisy actions."""
        head = copy.copy(self)
        head._modules = {**self._modules, "noisy_action_projector": projector}
        return head
