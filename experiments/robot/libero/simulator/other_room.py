"""LIBERO-PRO's environment perturbation: the same task in another room.

LIBERO-PRO names four suites `*_env` and publishes no files for them; its evaluation makes them when it is asked to
(`perturbation.create_env` with `use_environment`): the description's workspace is replaced, by the living room's table
whatever it was, and initial states are drawn from the result by resets (`generate_init_states`, 50 a task). That is
repeated here, with two differences, both needed for results that can be compared:

- Initial states are drawn with seeds of their own, so that they follow from the task's name and their number.
- Five tasks of libero_10 live in the living room already and would stay as they are. They move to the main table, the
  replacement that LIBERO-PRO's README recommends. (On the floor, another one that it allows, objects fly off.)

What is drawn goes to a cache (`$XDG_CACHE_HOME` or `~/.cache`, below `lightvla`) and is read from there afterwards.
Several processes may draw the same: what they draw is equal, and each moves its file into place when it is whole.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.backend import quiet, release_memory, seeded, simulator
from experiments.robot.libero.simulator.surroundings import cache_home, is_writable, temporary_folder
from prismatic.atomic_files import replacing, write_atomically

NUM_STATES = 50
"""Initial states per task, as many as LIBERO's own tasks have."""

LIVING_ROOM, MAIN_TABLE = "living_room_table", "main_table"

# Workspace -> (the word in the problem's name, the type among the fixtures).
_WORKSPACES = {
    MAIN_TABLE: ("Tabletop", "table"),
    "kitchen_table": ("Kitchen_Tabletop", "kitchen_table"),
    LIVING_ROOM: ("Living_Room_Tabletop", "living_room_table"),
    "study_table": ("Study_Tabletop", "study_table"),
    "floor": ("Floor", "floor"),
}
_RESET_ATTEMPTS = 100


def replace_workspace(description: str) -> str:
    """A task's description (BDDL) with another workspace: the living room's table, or the main table instead of it.

    Raises:
        ValueError: when the description has none of LIBERO's workspaces.
    """
    match = re.search(r"\(:fixtures\s+(\w+)\s+-\s+(\w+)", description)
    if match is None or match[1] not in _WORKSPACES or match[2] != _WORKSPACES[match[1]][1]:
        raise ValueError(f"no workspace of {', '.join(_WORKSPACES)} stands first among the description's fixtures")
    old, new = match[1], MAIN_TABLE if match[1] == LIVING_ROOM else LIVING_ROOM
    word, kind = _WORKSPACES[new]
    result = description.replace(old, new)
    result = re.sub(r"(\(define\s*\(problem\s+LIBERO_)\w*?(_Manipulation\))", rf"\g<1>{word}\g<2>", result, count=1)
    return re.sub(rf"(\(:fixtures\s+{new}\s+-\s+)\w+", rf"\g<1>{kind}", result, count=1)


def cache_directory() -> Path:
    """Where generated descriptions and initial states are kept; only for this run where the cache is not writable."""
    kept = cache_home() / "lightvla" / "libero_env"
    return kept if is_writable(kept) else temporary_folder() / "libero_env"


def bddl_file(base_suite: str, source: Path) -> Path:
    """Writes the perturbed description of a standard suite's task, unless it is there, and returns its path."""
    text = replace_workspace(source.read_text(encoding="utf-8"))
    # The digest keeps descriptions of another version of the benchmark apart.
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    target = cache_directory() / f"{base_suite}_env-{digest}" / source.name
    if not target.is_file():
        write_atomically(target, text)
    return target


def initial_states(base_suite: str, description: Path) -> NDArray[np.float64]:
    """(NUM_STATES, S): read from the cache, or drawn from the description and kept there."""
    target = description.with_suffix(".npy")
    if not target.is_file():
        states = draw_initial_states(f"{base_suite}_env/{description.stem}", description, NUM_STATES)
        with replacing(target) as partial, partial.open("wb") as file:
            np.save(file, states)
    return np.load(target, allow_pickle=False)


def draw_initial_states(key: str, description: Path, count: int) -> NDArray[np.float64]:
    """States after `count` resets, (count, S): a pure function of the key and the index.

    Raises:
        RuntimeError: when the objects find no valid places.
    """
    with quiet(), seeded(0):
        control = simulator().control_env(
            bddl_file_name=str(description),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            ignore_done=True,
            hard_reset=False,
        )
    model = control.env.sim.model._model
    fixtures = [model.body(fixture.root_body) for fixture in control.env.fixtures_dict.values()]
    described = [_described_pose(control.env.model.root, body.name) for body in fixtures]
    states = []
    for index in range(count):
        # A reset that keeps the model leaves fixtures where it placed them, and the next one places what lies on or in
        # them as if they still were where the model's file has them.
        for body, (position, quaternion) in zip(fixtures, described, strict=True):
            body.pos[:], body.quat[:] = position, quaternion
        states.append(_draw(control, zlib.crc32(f"{key}/{index}".encode())))
    del control, model, fixtures
    release_memory()
    return np.stack(states)


def _described_pose(root: ElementTree.Element, name: str) -> tuple[list[float], list[float]]:
    """Position in metres and quaternion (w, x, y, z) of a body in the model's XML, relative to its parent."""
    body = next(element for element in root.iter("body") if element.get("name") == name)
    return [float(x) for x in body.get("pos", "0 0 0").split()], [float(x) for x in body.get("quat", "1 0 0 0").split()]


def _draw(control: Any, seed: int) -> NDArray[np.float64]:
    with quiet(), seeded(seed):
        for _ in range(_RESET_ATTEMPTS):
            try:
                control.env.reset()
                return np.asarray(control.get_sim_state(), dtype=np.float64)
            except simulator().randomization_error:
                continue
    raise RuntimeError(f"seed {seed}: no valid placement of the objects in {_RESET_ATTEMPTS} attempts")
