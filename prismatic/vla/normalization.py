"""Fit statistics, normalise, un-normalise: the one implementation that training and inference share.

Statistics of a dataset are the published JSON layout as plain dictionaries:
`{"action": {mean, std, max, min, q01, q99, mask}, "proprio": {mean, std, max, min, q01, q99}, "num_transitions",
"num_trajectories"}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prismatic.vla.robots import NormalizationKind, RobotSpec

_EPSILON = 1e-8  # the published normaliser's; part of the map, so it is part of the inverse


def fit_statistics(
    actions: np.ndarray, states: np.ndarray | None, action_mask: Sequence[bool], num_trajectories: int
) -> dict[str, Any]:
    """Dataset statistics over all frames (population std, linear quantiles).

    Args:
        actions: (N, A), gripper already mapped to [0, 1].
        states: (N, P), or None for a dataset without proprioception.
        action_mask: per action dimension, whether it is normalised.
        num_trajectories: number of episodes the frames came from.
    """
    statistics: dict[str, Any] = {"action": {**_moments(actions), "mask": [bool(m) for m in action_mask]}}
    if states is not None:
        statistics["proprio"] = _moments(states)
    return {**statistics, "num_transitions": len(actions), "num_trajectories": int(num_trajectories)}


def _moments(x: np.ndarray) -> dict[str, list[float]]:
    x = np.asarray(x, dtype=np.float64)
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    parts = {"mean": x.mean(0), "std": x.std(0), "max": x.max(0), "min": x.min(0), "q01": q01, "q99": q99}
    return {name: [float(v) for v in value] for name, value in parts.items()}


def statistics_problems(
    name: str, parts: Any, robot: RobotSpec, use_proprio: bool | None = None, sized: bool = True
) -> list[str]:
    """What is wrong with one dataset's statistics for a robot, a sentence each; empty where they can be used.

    Args:
        name: of the dataset.
        parts: its statistics, as they were read.
        robot: whose normalisation and sizes count.
        use_proprio: whether the state is normalised by them too; None: only what is there of it must be right.
        sized: whether lengths must be the robot's.
    """
    needed = ("min", "max", "q01", "q99") if robot.normalization == "bounds_q99" else ("min", "max")
    problems = []
    for part, size in {"action": robot.action_dim, "proprio": robot.proprio_dim}.items():
        values = parts.get(part) if isinstance(parts, Mapping) else None
        where = f"statistics of {name!r}, {part}"
        if values is None:
            if part == "action" or use_proprio:
                problems.append(f"statistics of {name!r} have no part {part!r}; recompute them")
        elif not isinstance(values, Mapping):
            problems.append(f"{where}: is a {type(values).__name__}, expected lists by name (min, max, ...)")
        elif part == "action" or use_proprio is not False:
            problems += [f"{where}: {problem}" for problem in _part_problems(values, needed, robot, size * sized)]
    return problems


def _part_problems(values: Mapping[str, Any], needed: Sequence[str], robot: RobotSpec, size: int) -> list[str]:
    """Of one part; `size` is the robot's, 0 where it does not count."""
    if lacking := [key for key in needed if values.get(key) is None]:
        return [f"{', '.join(lacking)} missing, which {robot.normalization} needs; recompute them"]
    lists = {key: values[key] for key in (*needed, "mask") if values.get(key) is not None}
    for key, numbers in lists.items():
        if not isinstance(numbers, Sequence) or not all(isinstance(number, int | float) for number in numbers):
            return [f"{key} is no list of numbers; recompute them"]
        if size and len(numbers) != size:
            return [f"{key} has {len(numbers)} values, robot {robot.name!r} has {size}; they are of another robot"]
        if len(numbers) != len(values[needed[0]]):
            return [f"{key} has {len(numbers)} values, {needed[0]} has {len(values[needed[0]])}; recompute them"]
        if not np.isfinite(numbers).all():
            return [f"{key} holds NaN or infinity; recompute them"]
    for low, high in zip(needed[::2], needed[1::2], strict=True):
        if (np.asarray(values[low]) > np.asarray(values[high])).any():
            return [f"{low} lies above {high}; recompute them"]
    return []


def _bounds(statistics: Mapping[str, Any], kind: NormalizationKind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low_key, high_key = ("q01", "q99") if kind == "bounds_q99" else ("min", "max")
    if missing := [key for key in (low_key, high_key, "min", "max") if key not in statistics]:
        raise ValueError(
            f"dataset statistics lack {missing} (present: {sorted(statistics)}); normalisation {kind!r} needs them: "
            "recompute the statistics or correct dataset_statistics.json"
        )
    low, high = np.asarray(statistics[low_key], np.float64), np.asarray(statistics[high_key], np.float64)
    given = statistics.get("mask")  # null in JSON means the same as no mask
    mask = np.ones(low.shape, bool) if given is None else np.asarray(given, dtype=bool)
    return low, high, mask


def normalize(x: np.ndarray, statistics: Mapping[str, Any], kind: NormalizationKind = "bounds_q99") -> np.ndarray:
    """Map (..., n) raw values to [-1, 1] by one part ("action" or "proprio") of the statistics; float32.

    Dimensions outside the mask pass through; others that never vary become 0.
    """
    low, high, mask = _bounds(statistics, kind)
    x = np.asarray(x, dtype=np.float64)
    scaled = np.clip(2.0 * (x - low) / (high - low + _EPSILON) - 1.0, -1.0, 1.0)
    constant = np.asarray(statistics["min"]) == np.asarray(statistics["max"])
    return np.where(mask, np.where(constant, 0.0, scaled), x).astype(np.float32)


def unnormalize(x: np.ndarray, statistics: Mapping[str, Any], kind: NormalizationKind = "bounds_q99") -> np.ndarray:
    """Inverse of `normalize` for values in range, not clipped; float64 (..., n)."""
    low, high, mask = _bounds(statistics, kind)
    x = np.asarray(x, dtype=np.float64)
    return np.where(mask, 0.5 * (x + 1.0) * (high - low + _EPSILON) + low, x)
