"""What callers of `predict_action` pass, checked before anything runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from prismatic.vla.normalization import statistics_problems
from prismatic.vla.robots import RobotSpec


def check_both(proprio: object, proprio_projector: object) -> None:
    """Raises ValueError where of the state and its projector only one is there."""
    if (proprio is None) != (proprio_projector is None):
        given, lacking = ("proprio", "proprio_projector")[:: 1 if proprio_projector is None else -1]
        raise ValueError(f"predict_action got {given} without {lacking}; pass both, or neither")


def checked_proprio(proprio: np.ndarray | torch.Tensor, robot: RobotSpec, samples: int) -> torch.Tensor:
    """(B, P) float32 of finite numbers. Raises ValueError for anything else."""
    state, width = torch.as_tensor(proprio).float(), robot.proprio_dim
    if state.numel() != samples * width or state.shape[-1:] != (width,):
        raise ValueError(
            f"proprio has shape {tuple(state.shape)}; robot {robot.name!r} needs {width} numbers for each of "
            f"{samples} samples, normalised"
        )
    if not state.isfinite().all():
        raise ValueError(f"proprio holds NaN or infinity: {state.tolist()}")
    return state.reshape(samples, width)


def chosen_statistics(norm_stats: Mapping[str, Any], unnorm_key: str | None, robot: RobotSpec) -> Mapping[str, Any]:
    """Those of the dataset's actions; the key may be None where there is only one. Raises ValueError for misfits."""
    known = sorted(norm_stats)
    key = known[0] if unnorm_key is None and len(known) == 1 else unnorm_key
    if key is None or key not in norm_stats:
        raise ValueError(
            f"unnorm_key={unnorm_key!r} names no dataset of this checkpoint; known: {', '.join(known) or 'none'}"
        )
    if problems := statistics_problems(key, norm_stats[key], robot, use_proprio=False):
        raise ValueError(f"norm_stats: {problems[0]}")
    return norm_stats[key]["action"]
