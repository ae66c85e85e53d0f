"""Temporal ensembling: one action of what several chunks foresaw for the same control step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ensembled(foreseen: NDArray[np.float64], decay: float, grippers: Sequence[int] = ()) -> NDArray[np.float64]:
    """The weighted average of several chunks' actions for one control step, weights exp(-decay * i).

    Action Chunking with Transformers, arXiv 2304.13705, section IV-A. The mean of an open and a closed gripper is
    neither, so grippers take the weighted median instead, which is always one of the commands.

    Args:
        foreseen: (N, action_dim), the oldest chunk's first.
        decay: how much less each newer one counts; 0: all alike.
        grippers: dimensions that are grippers.

    Returns:
        (action_dim,).
    """
    weights = np.exp(-decay * np.arange(len(foreseen)))
    weights /= weights.sum()
    action: NDArray[np.float64] = weights @ foreseen
    for dimension in grippers:
        action[dimension] = _weighted_median(foreseen[:, dimension], weights)
    return action


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The lowest value at and below which lies half of the weight, or more."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, 0.5 - 1e-12)])
