"""The settings of a collection of demonstrations."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.demonstrations.rlds_writer import VERSION
from experiments.robot.libero.settings.flags import parse_indices
from experiments.robot.libero.simulator.renderer import RENDERERS
from experiments.robot.libero.simulator.wide_starts import Displacement
from prismatic.vla.datasets.writer import check_name


@dataclass
class CollectionConfig:
    """Collect demonstrations of LIBERO tasks with scripted experts, as an RLDS dataset."""

    output_dir: Path = Path("datasets")  # the dataset goes to <output_dir>/<dataset_name>/1.0.0
    dataset_name: str = "libero_demos"  # name of the folder that is written
    task_suite_name: str = "libero_goal"  # one suite, or several joined by commas
    task_ids: str = "all"  # like 1,4,8 or 0-4,7
    initial_states: str = "all"  # like 0-29; later ones stand in for those that could not be solved
    num_demos_per_task: str = "30"  # one number, or one for each task like 40,40,80
    resolution: int = 256  # side of the stored pictures, pixels
    renderer: str = "robosuite"  # robosuite: the published datasets' pixels; fast: a third of the time
    num_processes: int = 2  # simulators at once
    wide_starts_m: float = 0.0  # move the goal's objects anywhere free within so many metres; 0: standard starts
    wide_starts_share: float = 1.0  # of the demonstrations; the others begin at standard starts
    wide_starts_objects: str = "goal"  # goal: all movable things that the goal names; manipulated: what is picked up
    recovery_pushes: bool = False  # push the robot now and then and keep only how it recovers
    recovery_mistakes: bool = False  # up to half of the demonstrations begin behind a missed grasp or misplaced object
    steps_past_success: int = 10  # recorded after the goal first holds, so that letting go is seen
    settle_steps: int = 10  # unrecorded steps after each reset
    canonical_quaternion: bool = False  # the state's quaternion with x >= 0; False in published datasets
    seed: int = 7  # of wide starts, pushes and mistakes

    def validate(self) -> None:
        """Raises ValueError for a value out of range."""
        _check_simulation(self)
        if self.steps_past_success < 0:
            raise ValueError(f"steps_past_success is {self.steps_past_success}; expected 0 or more")
        if not 0 <= self.wide_starts_share <= 1:
            raise ValueError(f"wide_starts_share is {self.wide_starts_share}; expected 0 to 1")
        self._displacement(trial=0)

    def demonstrations(self, num_tasks: int) -> list[int]:
        """How many each task shall have; raises ValueError unless that is one number, or one per task, from 1 on."""
        words = str(self.num_demos_per_task).split(",")
        numbers = [int(word) if word.strip().isdigit() else 0 for word in words]
        if len(numbers) not in (1, num_tasks) or min(numbers) < 1:
            raise ValueError(
                f"num_demos_per_task is {self.num_demos_per_task!r}; expected a number from 1 on, or {num_tasks} of "
                "them joined by commas, one for each task"
            )
        return numbers * num_tasks if len(numbers) == 1 else numbers

    def displacement(self, initial_state: int, trial: int) -> Displacement | None:
        """How objects are moved in a trial of an initial state; None for a standard start."""
        is_wide = np.random.default_rng([self.seed, initial_state, trial]).random() < self.wide_starts_share
        return self._displacement(trial) if is_wide else None

    def _displacement(self, trial: int) -> Displacement | None:
        if self.wide_starts_m == 0:
            return None
        return Displacement(self.wide_starts_m, self.seed, "train", trial, self.wide_starts_objects)

    @property
    def randomised(self) -> bool:
        """Whether one initial state gives different demonstrations in different trials."""
        return self.wide_starts_m > 0 or self.recovery_pushes or self.recovery_mistakes

    @property
    def environment_options(self) -> dict[str, Any]:
        """Keyword arguments of the simulators."""
        return {name: getattr(self, name) for name in _SIMULATION}

    @property
    def dataset_dir(self) -> Path:
        return Path(self.output_dir) / self.dataset_name / VERSION

    @property
    def cache_dir(self) -> Path:
        return Path(self.output_dir) / ".collect" / f"{self.dataset_name}-{self.fingerprint()}"

    def fingerprint(self) -> str:
        """Of everything that a single demonstration depends on: demonstrations with the same one may be mixed."""
        elsewhere = (
            "output_dir",
            "dataset_name",
            "task_suite_name",
            "task_ids",
            "initial_states",
            "num_demos_per_task",
        )
        parts = {key: value for key, value in asdict(self).items() if key not in (*elsewhere, "num_processes")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def content(self) -> dict[str, str]:
        """What decides the dataset's content, as text."""
        return {key: str(value) for key, value in asdict(self).items() if key not in ("output_dir", "num_processes")}


@dataclass
class RegenerationConfig:
    """Play LIBERO's HDF5 demonstrations again in the simulator, and write those that succeed as an RLDS dataset."""

    libero_task_suite: str = "libero_goal"  # whose demonstrations they are
    libero_raw_data_dir: Path = Path(
        "datasets"
    )  # holds <task>_demo.hdf5 of the suite, or a folder named like the suite
    libero_target_dir: Path = Path("datasets")  # the dataset goes to <libero_target_dir>/<dataset_name>/1.0.0
    dataset_name: str = ""  # name of the folder that is written; empty: <suite>_no_noops
    task_ids: str = "all"  # like 1,4,8 or 0-4,7
    demonstrations: str = "all"  # of each file, like 0-9
    drop_noops: bool = True  # leave out, and do not execute, steps in which neither arm nor gripper is to move
    resolution: int = 256  # side of the stored pictures, pixels
    renderer: str = "robosuite"  # robosuite: the published datasets' pixels; fast: a third of the time
    num_processes: int = 2  # simulators at once
    settle_steps: int = 10  # unrecorded steps before each demonstration, in which objects come to rest
    canonical_quaternion: bool = False  # the state's quaternion with x >= 0; False in published datasets
    seed: int = 0  # of the fixtures' places, where a demonstration does not tell them

    def validate(self) -> None:
        """Raises ValueError for a value out of range."""
        _check_simulation(self)
        check_name(self.name)

    @property
    def name(self) -> str:
        """Of the dataset."""
        return self.dataset_name or f"{self.libero_task_suite}_{'no_noops' if self.drop_noops else 'with_noops'}"

    @property
    def environment_options(self) -> dict[str, Any]:
        """Keyword arguments of the simulators."""
        return {name: getattr(self, name) for name in _SIMULATION}

    @property
    def dataset_dir(self) -> Path:
        return self.libero_target_dir / self.name / VERSION

    @property
    def cache_dir(self) -> Path:
        """Where finished demonstrations wait for the others; those of equal settings may be mixed."""
        parts = json.dumps([self.drop_noops, self.environment_options], sort_keys=True)
        return self.libero_target_dir / ".regenerate" / f"{self.name}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"

    def content(self) -> dict[str, str]:
        """What decides the dataset's content beside the demonstrations themselves, as text."""
        elsewhere = ("libero_raw_data_dir", "libero_target_dir", "dataset_name", "num_processes")
        return {key: str(value) for key, value in asdict(self).items() if key not in elsewhere}


_SIMULATION = ("resolution", "renderer", "settle_steps", "canonical_quaternion", "seed")


def _check_simulation(config: CollectionConfig | RegenerationConfig) -> None:
    """Raises ValueError for settings of the simulators that are out of range."""
    if config.renderer not in RENDERERS:
        raise ValueError(f"unknown renderer {config.renderer!r}; known: {', '.join(RENDERERS)}")
    for name, least in (("num_processes", 1), ("resolution", 1), ("settle_steps", 0), ("seed", 0)):
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{name} is {value}; expected {'at least 1' if least else '0 or more'}")


def choose_indices(text: str, count: int, flag: str) -> list[int]:
    """Reads `all`, or numbers and ranges like `0-4,7`; raises ValueError for anything else or beyond count - 1."""
    if text.strip() == "all":
        return list(range(count))
    chosen = parse_indices(text, flag)
    if max(chosen) >= count:
        raise ValueError(f"--{flag} {text!r}: there is no {max(chosen)}; expected 0 to {count - 1}, or 'all'")
    return chosen
