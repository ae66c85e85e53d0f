"""In which form a run trains its pruner, and the noise that lets it explore."""

import numpy as np
import torch

from prismatic.models.pruners.registry import PrunerSpec
from prismatic.training.config import FinetuneConfig

NOISE_STREAM = 2
"""Keeps the noise's random numbers apart from those of the order and of the augmentation."""


def compact_form(config: FinetuneConfig) -> bool:
    """Whether training runs over distinct picks; dropout in adapters makes duplicates of a token differ."""
    return config.compact_training and not (config.use_lora and config.lora_dropout > 0)


def check_form(config: FinetuneConfig, spec: PrunerSpec) -> None:
    """Raises ValueError where the flags ask for a form of training that the pruner does not have."""
    if spec.has_parameters and not config.compact_training:
        raise ValueError(
            f"--compact_training False trains one row per query with duplicates, but {spec.name} keeps a set; set "
            "--compact_training True"
        )
    if spec.has_parameters or compact_form(config) or spec.options.get("multiplicity") != "set":
        return
    flag = f"--lora_dropout {config.lora_dropout}" if config.compact_training else "--compact_training False"
    remedy = "--lora_dropout 0" if config.compact_training else "--compact_training True"
    raise ValueError(
        f"{flag} trains one row per query, which multiplicity=set cannot weigh; set {remedy} or "
        "--pruner lightvla:multiplicity=weighted"
    )


def score_noise(
    kind: str, seed: int, positions: torch.Tensor, num_tokens: int, scale: float, num_queries: int | None = None
) -> torch.Tensor | None:
    """The pruner's exploration noise, drawn per sample from (seed, global sample position).

    A position belongs to one step and one sample, so neither the number of ranks nor a resume changes the draws.

    Args:
        kind: `uniform` on [0, 1) (what the published code does), `gumbel` (the paper's name) or `none`.
        seed: of the run.
        positions: (B,) global sample positions.
        num_tokens: V.
        scale: factor on the noise.
        num_queries: Q; None: as many as tokens.

    Returns:
        (B, Q, V) float32 on the CPU, or None where there is no noise.
    """
    if kind == "none" or scale == 0.0:
        return None
    shape = (num_queries or num_tokens, num_tokens)
    draws = np.empty((len(positions), *shape), np.float32)
    for row, position in zip(draws, positions.tolist(), strict=True):
        np.random.default_rng([seed, position, NOISE_STREAM]).random(dtype=np.float32, out=row)
    noise = torch.from_numpy(draws)
    if kind == "gumbel":
        tiny = torch.finfo(torch.float32).tiny
        noise = noise.clamp_(min=tiny).log_().neg_().clamp_(min=tiny).log_().neg_()
    elif kind != "uniform":
        raise ValueError(f"pruner noise {kind!r} is unknown; choose uniform, gumbel or none")
    return noise.mul_(scale)
