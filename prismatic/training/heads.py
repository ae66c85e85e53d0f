"""Which action head a run trains, and the random draws that diffusion learns from."""

import numpy as np
import torch

from prismatic.models.contract import ActionHead
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.training.config import FinetuneConfig

DIFFUSION_STREAM = 4
"""Keeps these random numbers apart from those of the order, the augmentation and the pruner."""


def wanted_head(config: FinetuneConfig) -> str:
    """The kind of head that the flags ask for: `l1`, `diffusion` or `discrete`."""
    return "l1" if config.use_l1_regression else "diffusion" if config.use_diffusion else "discrete"


def diffusion_draws(head: ActionHead, seed: int, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a diffusion head needs beside the batch; nothing for other heads.

    Drawn per sample from (seed, global sample position), so neither the number of ranks nor a resume changes them.

    Returns:
        `diffusion_noise` (B, chunk, action_dim) float32 and `diffusion_timesteps` (B,), on the CPU.
    """
    if not isinstance(head, DiffusionActionHead):
        return {}
    generators = [np.random.default_rng([seed, position, DIFFUSION_STREAM]) for position in positions.tolist()]
    shape = (head.chunk_length, head.action_dim)
    steps = [int(generator.integers(head.num_train_steps)) for generator in generators]
    noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
    return {"diffusion_noise": torch.from_numpy(noise), "diffusion_timesteps": torch.tensor(steps)}
