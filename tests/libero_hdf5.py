"""HDF5 files in the layout of LIBERO's published demonstrations (its `scripts/create_dataset.py`)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.tasks import LiberoTask


@dataclass(frozen=True)
class Demo:
    """A demonstration of T steps to be written."""

    actions: NDArray[np.float64]
    states: NDArray[np.float64]
    model_file: str = ""


def write_hdf5(file: Path, task: LiberoTask, demos: list[Demo]) -> Path:
    """Writes one task's file; pictures are black and small, since nothing reads them."""
    with h5py.File(file, "w") as stored:
        data = stored.create_group("data")
        data.attrs["env_name"] = "Libero_Tabletop_Manipulation"
        data.attrs["bddl_file_name"] = f"chiliocosm/bddl_files/{task.suite}/{task.name}.bddl"
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.language})
        data.attrs["num_demos"], data.attrs["total"] = len(demos), sum(len(demo.actions) for demo in demos)
        for number, demo in enumerate(demos):
            group, steps = data.create_group(f"demo_{number}"), len(demo.actions)
            group.attrs["num_samples"], group.attrs["init_state"] = steps, demo.states[0]
            if demo.model_file:
                group.attrs["model_file"] = demo.model_file
            last = (np.arange(steps) == steps - 1).astype(np.uint8)
            arrays: dict[str, Any] = {"actions": demo.actions, "states": demo.states, "rewards": last, "dones": last}
            arrays["robot_states"] = np.zeros((steps, 9))
            widths = {"gripper_states": 2, "joint_states": 7, "ee_states": 6, "ee_pos": 3, "ee_ori": 3}
            arrays |= {f"obs/{name}": np.zeros((steps, width)) for name, width in widths.items()}
            pictures = np.zeros((steps, 8, 8, 3), np.uint8)
            arrays |= {f"obs/{name}": pictures for name in ("agentview_rgb", "eye_in_hand_rgb")}
            for name, values in arrays.items():
                group.create_dataset(name, data=values)
    return file
