"""Demonstrations as LIBERO publishes them: one HDF5 file per task, `data/demo_N/{actions, states, obs/..., ...}`.

What a replay needs is read: actions, the simulator's state before the first of them, and the places of the fixtures,
which are no part of a state but stand in the model that LIBERO stores with each demonstration. Pictures are drawn anew,
so `obs` is not read; its length is compared.

The layout: github.com/Lifelong-Robot-Learning/LIBERO, scripts/create_dataset.py.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.environment import Pose
from experiments.robot.libero.simulator.tasks import LiberoTask


@dataclass(frozen=True, eq=False)
class StoredDemonstration:
    """One demonstration of T steps.

    Attributes:
        number: N of `demo_N`.
        actions: (T, 7) in the simulator's convention.
        initial_state: (S,) time, positions, velocities before the first action.
        sha256: of what a replay depends on.
    """

    file: Path
    number: int
    actions: NDArray[np.float64] = field(repr=False)
    initial_state: NDArray[np.float64] = field(repr=False)
    sha256: str

    @property
    def name(self) -> str:
        return f"demo_{self.number}"


def file_of(folder: Path, task: LiberoTask) -> Path:
    """The HDF5 file of a task, in `folder` or in a folder there that is named like the suite.

    Raises:
        FileNotFoundError: when there is none; the message says which files there are.
    """
    if (folder / task.suite).is_dir():
        folder = folder / task.suite
    file = folder / f"{task.name}_demo.hdf5"
    if file.is_file():
        return file
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--libero_raw_data_dir {folder} does not exist; give the folder of LIBERO's HDF5 files"
        )
    there = sorted(path.name for path in folder.glob("*.hdf5"))
    shown = f"the HDF5 files there are {', '.join(there[:3])}{' ...' * (len(there) > 3)}" if there else "there is none"
    raise FileNotFoundError(
        f"{task.suite} task {task.index} needs {file.name} in {folder}, but {shown}; give another "
        "--libero_raw_data_dir or --libero_task_suite, or choose --task_ids"
    )


def read_demonstrations(file: Path, task: LiberoTask) -> list[StoredDemonstration]:
    """All demonstrations of a file, by their numbers.

    Raises:
        ModuleNotFoundError: without h5py.
        ValueError: when the file is of another task or not of this layout; the message is a sentence with the remedy.
    """
    with _opened(file) as stored:
        _check_task(file, stored["data"], task)
        names = [match for name in stored["data"] if (match := re.fullmatch(r"demo_(\d+)", name))]
        if not names:
            raise ValueError(
                f"{file} has no demonstrations: expected data/demo_0, data/demo_1, ... as LIBERO writes them"
            )
        numbers = sorted(int(match[1]) for match in names)
        return [_read(file, stored["data"], number, task) for number in numbers]


def fixture_poses(demonstration: StoredDemonstration) -> dict[str, Pose]:
    """Body -> where it stood, relative to its parent, of every body of the stored model; empty if none is stored.

    Raises:
        ValueError: when the stored model is no XML.
    """
    with _opened(demonstration.file) as stored:
        text = _text(stored["data"][demonstration.name].attrs.get("model_file", ""))
    if not text:
        return {}
    try:
        bodies = list(ElementTree.fromstring(text).iter("body"))
    except ElementTree.ParseError as error:
        where = f"{demonstration.file}, {demonstration.name}"
        raise ValueError(f"{where}: the attribute model_file is no XML ({error}); download the file again") from error
    return {
        body.get("name", ""): (_numbers(body, "pos", "0 0 0"), _numbers(body, "quat", "1 0 0 0")) for body in bodies
    }


def _opened(file: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading LIBERO's HDF5 files needs h5py; run: pip install -e '.[data]'") from error
    try:
        stored = h5py.File(file, "r")
    except OSError as error:
        raise ValueError(f"{file} is no HDF5 file, or not all of one ({error}); download it again") from error
    if "data" not in stored:
        stored.close()
        raise ValueError(f"{file} has no group 'data'; expected data/demo_0/actions and so on, as LIBERO writes them")
    return stored


def _check_task(file: Path, data: Any, task: LiberoTask) -> None:
    """The file says by its attributes which task it is of; a renamed file would be played in another scene."""
    described = Path(_text(data.attrs.get("bddl_file_name", ""))).stem
    if described not in ("", task.name):
        raise ValueError(
            f"{file} holds demonstrations of {described!r}, not of {task.suite} task {task.index} ({task.name!r}); "
            "give each file its own name back"
        )


def _read(file: Path, data: Any, number: int, task: LiberoTask) -> StoredDemonstration:
    where, group = f"{file}, demo_{number}", data[f"demo_{number}"]
    missing = [name for name in ("actions", "states") if name not in group]
    if missing:
        raise ValueError(f"{where} lacks {' and '.join(missing)}; it has {', '.join(group) or 'nothing'}")
    lengths = {name: len(group[name]) for name in ("actions", "states", "rewards", "dones") if name in group}
    lengths |= {f"obs/{name}": len(group["obs"][name]) for name in group.get("obs", {})}
    if "num_samples" in group.attrs:
        lengths["num_samples"] = int(group.attrs["num_samples"])
    if len(set(lengths.values())) > 1 or not lengths["actions"]:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{where}: expected as many steps everywhere, and at least one; got {told}; download it again")
    actions, states = (np.asarray(group[name][()], dtype=np.float64) for name in ("actions", "states"))
    if actions.ndim != 2 or actions.shape[1] != 7 or not np.isfinite(actions).all():
        raise ValueError(f"{where}: expected actions of 7 finite numbers; got shape {actions.shape}")
    expected = task.init_states.shape[1]
    if states.ndim != 2 or states.shape[1] != expected:
        raise ValueError(
            f"{where}: states have shape {states.shape}, and this task's have {expected} numbers (time, positions, "
            "velocities); the file was made with another version of LIBERO, or for another task"
        )
    if not np.isfinite(states[0]).all():
        raise ValueError(f"{where}: the first state holds NaN or infinity; download the file again")
    model = _text(group.attrs.get("model_file", ""))
    parts = (actions.tobytes(), states[0].tobytes(), model.encode())
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    return StoredDemonstration(file, number, actions, states[0], digest)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _numbers(body: ElementTree.Element, attribute: str, default: str) -> NDArray[np.float64]:
    return np.array(body.get(attribute, default).split(), dtype=np.float64)
