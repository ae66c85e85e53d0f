"""Which pruner a run trains, and the noise that lets it explore."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismatic.models.pruners.registry import DEFAULT_QUERIES, STAR, PrunerSpec
from prismatic.stored_files import read_json
from prismatic.training.config import FinetuneConfig

NOISE_STREAM = 2
"""Keeps the noise's random numbers apart from those of the order and of the augmentation."""

HOUSE_OPTIONS: dict[str, dict[str, Any]] = {
    "lightvla": {"multiplicity": "weighted", "noise": "uniform"},
    STAR: {"site": "projector", "queries": DEFAULT_QUERIES, "min_tokens": 0, "noise": "uniform"},
}
"""By pruner, what neither a flag nor the checkpoint says."""


def recorded_pruner(folder: Path) -> PrunerSpec | None:
    """The pruner that a checkpoint's `config.json` records; None where it records none, as published ones do."""
    recorded = read_json(folder / "config.json").get("pruner")
    return PrunerSpec.from_json(recorded) if recorded else None


def training_pruner(config: FinetuneConfig, recorded: PrunerSpec | None) -> PrunerSpec:
    """The pruner to train: the flag's, else the checkpoint's, else LightVLA; options in the same order of precedence.

    A checkpoint without a record was trained weighted, so weighted is what training goes on with.

    Raises:
        ValueError: for a flag that cannot be understood or a pruner that cannot be trained.
    """
    spec = PrunerSpec.parse(config.pruner) if config.pruner is not None else recorded or PrunerSpec("lightvla")
    if spec.name == "random":
        raise ValueError("pruner 'random' is a control for evaluation; train with --pruner lightvla or --pruner none")
    if spec.name not in HOUSE_OPTIONS:
        return spec
    inherited = recorded.options if recorded is not None and recorded.name == spec.name else {}
    return spec.over(PrunerSpec(spec.name, inherited).over(HOUSE_OPTIONS[spec.name]).options)


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
