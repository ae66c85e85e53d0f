"""Initial states from a JSON file, in OpenVLA-OFT's published format.

`{"put_the_bowl_on_the_plate": {"demo_0": {"success": true, "initial_state": [...]}, ...}, ...}`, as its
`regenerate_libero_dataset.py` writes it: the task's published sentence with underscores, the number of the
demonstration, whether its replay reached the goal, and LIBERO's flattened simulator state.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.tasks import LiberoTask, get_suite

_FORMAT = '{"task_in_words": {"demo_0": {"success": true, "initial_state": [numbers]}}}'


def read_initial_states(path: str, task: LiberoTask) -> dict[int, NDArray[np.float64]]:
    """The states (S,) of a task by their numbers, in order; entries whose demonstration failed are left out.

    Raises:
        FileNotFoundError: when the file does not exist.
        ValueError: when the file is not of that format, the task is not in it, or a state does not fit the task.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--initial_states_path {path} does not exist; give a JSON file or DEFAULT")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--initial_states_path {path} is not JSON ({error}); expected {_FORMAT}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--initial_states_path {path} holds a {type(content).__name__}; expected {_FORMAT}")
    key = get_suite(task.suite).get_task(task.index).language.replace(" ", "_")
    if key not in content:
        raise ValueError(f"{path} has no task {key!r}; it has: {', '.join(sorted(content))}")
    if not isinstance(content[key], dict):
        raise ValueError(f"{path}, {key}: expected entries demo_0, demo_1, ... as in {_FORMAT}")
    length = task.init_states.shape[1]
    states: dict[int, NDArray[np.float64]] = {}
    names: dict[int, str] = {}
    for name, entry in content[key].items():
        number, success, state = _read_entry(f"{path}, {key}, {name}", name, entry, length)
        if number in names:
            raise ValueError(f"{path}, {key}: {names[number]} and {name} are both number {number}; expected each once")
        names[number] = name
        if success:
            states[number] = state
    if not states:
        raise ValueError(f'{path}, {key}: no entry has "success": true, so there is nothing to start from')
    return dict(sorted(states.items()))


def _read_entry(where: str, name: str, entry: Any, length: int) -> tuple[int, bool, NDArray[np.float64]]:
    match = re.fullmatch(r"demo_(\d+)", name)
    if match is None:
        raise ValueError(f"{where}: expected a name such as demo_0")
    if not isinstance(entry, dict) or not isinstance(entry.get("success"), bool) or "initial_state" not in entry:
        raise ValueError(f'{where}: expected {{"success": true or false, "initial_state": [numbers]}}')
    try:
        state = np.asarray(entry["initial_state"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: initial_state holds something that is no number ({error})") from error
    if state.shape != (length,) or not np.isfinite(state).all():
        raise ValueError(
            f"{where}: initial_state has shape {state.shape}; this task's states are {length} finite numbers (time, "
            "positions, velocities). Was the file made for another suite?"
        )
    return int(match[1]), entry["success"], state
