"""Statistics of a dataset, computed once and kept as JSON beside its shards in the published format."""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from prismatic.atomic_files import write_atomically
from prismatic.vla.datasets.catalog import DatasetSpec
from prismatic.vla.datasets.stored.index import DatasetIndex
from prismatic.vla.normalization import fit_statistics

logger = logging.getLogger(__name__)


def dataset_statistics(index: DatasetIndex, spec: DatasetSpec | None = None) -> dict[str, Any]:
    """Statistics over all frames of all splits, gripper already mapped.

    All splits means `test` as well, as in the reference, whose published statistics are over tensorflow-datasets'
    split `all`: they scale actions and nothing is learnt from them. The state has some only where the index read it.

    They are read from `dataset_statistics_<hash>.json` in the dataset's folder if it is there, else written to it. The
    hash covers every state and action, so changed shards get a new file. A folder that cannot be written is only
    logged.

    Args:
        index: the dataset.
        spec: how actions are mapped; the index's own by default.

    Returns:
        `{"action": ..., "proprio": ..., "num_transitions", "num_trajectories"}`, `proprio` only where there are states.
    """
    spec = spec or index.spec
    actions = np.concatenate([spec.map_actions(episode.action) for episode in index.episodes])
    found = [episode.state for episode in index.episodes if episode.state is not None]
    states = np.concatenate(found) if found else None
    fingerprint = _fingerprint(actions, states, len(index.episodes), spec.robot.action_mask)
    path = index.directory / f"dataset_statistics_{fingerprint}.json"
    try:
        return json.loads(path.read_text())[spec.name]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not what we write: made anew
    statistics = fit_statistics(actions, states, spec.robot.action_mask, len(index.episodes))
    try:
        write_atomically(path, json.dumps({spec.name: statistics}, indent=2) + "\n")  # several ranks may do so at once
    except OSError as error:
        logger.warning(
            "cannot keep the statistics of %s at %s (%s): computing them at every start", spec.name, path, error
        )
    return statistics


def _fingerprint(actions: np.ndarray, states: np.ndarray | None, trajectories: int, mask: Sequence[bool]) -> str:
    # 2: version of the computation
    digest = hashlib.sha256(f"2 {trajectories} {actions.shape} {[*map(bool, mask)]}".encode())
    digest.update(np.ascontiguousarray(actions).tobytes())
    if states is not None:
        digest.update(np.ascontiguousarray(states).tobytes())
    return digest.hexdigest()[:16]
