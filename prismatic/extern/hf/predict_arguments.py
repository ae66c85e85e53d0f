"""What callers of `predict_action` pass, checked before anything runs."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from prismatic.models.autoregressive import AUTOREGRESSIVE, WITHOUT_FILES
from prismatic.models.contract import ActionHead
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.vla.normalization import statistics_problems
from prismatic.vla.robots import RobotSpec

logger = logging.getLogger(__name__)


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


def head_for(model: Any, head: ActionHead | None, noisy_action_projector: nn.Module | None) -> ActionHead:
    """What decodes: the given head, else the LM head. Raises ValueError where the checkpoint records another."""
    recorded = model.config.action_head
    if head is None and recorded not in (None, *WITHOUT_FILES):
        raise ValueError(
            f"the checkpoint has an action head of kind {recorded!r}, and predict_action got none: pass "
            "action_head (Policy.from_pretrained(...).action_head), or set config.action_head to 'discrete'"
        )
    if head is None and recorded is None:
        logger.warning(
            "no action_head is given and config.json records none: a chunk of tokens is decoded at once; load an "
            "original OpenVLA checkpoint by Policy.from_pretrained or from a local folder"
        )
    if head is None:
        head = model.autoregressive_head() if recorded == AUTOREGRESSIVE else model.discrete_head()
    if noisy_action_projector is None:
        return head
    if not isinstance(head, DiffusionActionHead):
        raise ValueError(
            f"noisy_action_projector belongs to a diffusion head, but action_head is of kind {head.kind!r}; pass "
            "a DiffusionActionHead, or leave the projector out"
        )
    return head.with_projector(noisy_action_projector)
