"""Everything that changes during training, as pure functions of the number of finished optimiser steps."""

import math

COSINE_FLOOR = 0.02
"""The cosine schedule never goes below this share of the peak rate, so the last steps still move the weights."""

STEP_DECAY = 0.1
WARMUP_START = 0.1
SCHEDULES = ("step", "cosine")
NOISE_SCHEDULES = ("linear", "constant")


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up from a tenth of the rate: `0.1 + 0.9 min((step + 1) / warmup_steps, 1)`; 1 without warm-up."""
    if warmup_steps <= 0:
        return 1.0
    return WARMUP_START + (1.0 - WARMUP_START) * min((step + 1) / warmup_steps, 1.0)


def decay_factor(step: int, schedule: str, max_steps: int, num_steps_before_decay: int) -> float:
    """`step`: a tenth from `num_steps_before_decay` on; `cosine`: half a cosine over `max_steps`, down to the floor."""
    if schedule == "step":
        return STEP_DECAY if step >= num_steps_before_decay else 1.0
    if schedule == "cosine":
        return max(COSINE_FLOOR, 0.5 * (1.0 + math.cos(math.pi * min(step / max_steps, 1.0))))
    raise ValueError(f"lr_schedule {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")


def noise_scale(step: int, max_steps: int, end_fraction: float = 1.0, schedule: str = "linear") -> float:
    """Scale of the pruner's exploration noise.

    `linear`: `1 - step / (end_fraction max_steps)`, never negative. The paper anneals over the whole run
    (`end_fraction = 1`); ending earlier leaves steps in which the model sees the picks that inference will make.
    `constant`: 1 throughout.
    """
    if schedule == "constant":
        return 1.0
    if end_fraction <= 0:
        return 0.0
    return max(0.0, 1.0 - step / (end_fraction * max_steps))


def ema_momentum(step: int, decay: float) -> float:
    """Share of the old average kept after finished step `step` (1, 2, ...): `min(decay, step / (step + 20))`.

    The ramp keeps the random initial weights from lingering in short runs.
    """
    return min(decay, step / (step + 20.0))
