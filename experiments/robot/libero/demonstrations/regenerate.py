"""LIBERO's HDF5 demonstrations -> an RLDS dataset: replays in parallel simulator processes, then one dataset.

Every demonstration is replayed without drawing. Only a success is drawn, and saved as one file under
`<libero_target_dir>/.regenerate` until the dataset is written, so that an interrupted regeneration goes on where it
stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.robot.libero.demonstrations.config import RegenerationConfig, choose_indices
from experiments.robot.libero.demonstrations.files import load_episodes, save_demonstration
from experiments.robot.libero.demonstrations.hdf5_files import StoredDemonstration, file_of, read_demonstrations
from experiments.robot.libero.demonstrations.pool import open_pool, worker_environment
from experiments.robot.libero.demonstrations.replaying import ReplayFailed, replay
from experiments.robot.libero.demonstrations.rlds_writer import Episode
from experiments.robot.libero.settings.flags import parse_indices
from experiments.robot.libero.simulator.backend import check_rendering
from experiments.robot.libero.simulator.environment import CAMERAS, SimulationUnstable
from experiments.robot.libero.simulator.surroundings import is_writable
from experiments.robot.libero.simulator.tasks import LiberoTask, get_suite, load_task
from prismatic.atomic_files import replacing
from prismatic.vla.datasets.catalog import LAYOUTS
from prismatic.vla.datasets.writer import NewEpisode, RldsWriter

SUMMARY_FILE = "regeneration.json"
STATES_FILE = "initial_states.json"
"""First states and outcomes in OpenVLA-OFT's format, which an evaluation reads (`--initial_states_path`)."""


@dataclass(frozen=True)
class Outcome:
    """What became of a demonstration: `steps` are kept and `dropped` moved nothing, or why it is left out."""

    steps: int
    dropped: int
    reason: str | None = None


@dataclass
class TaskReplays:
    """The demonstrations of one task, and what became of each that is done."""

    task: LiberoTask
    demonstrations: list[StoredDemonstration]
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def kept(self) -> list[StoredDemonstration]:
        return [it for it in self.demonstrations if self.outcomes[it.number].reason is None]

    def summary(self) -> dict[str, Any]:
        """For JSON: how many there were and are, how much of them, and why the others are left out."""
        outcomes = [self.outcomes[it.number] for it in self.demonstrations]
        return {
            "suite": self.task.suite,
            "task": self.task.index,
            "language": self.task.language,
            "bddl_sha256": self.task.bddl_sha256,
            "file": self.demonstrations[0].file.name,
            "demonstrations": len(outcomes),
            "kept": len(self.kept),
            "steps": sum(outcome.steps for outcome in outcomes),
            "dropped_steps": sum(outcome.dropped for outcome in outcomes),
            "left_out": [it.name for it in self.demonstrations if self.outcomes[it.number].reason is not None],
            "reasons": dict(Counter(outcome.reason for outcome in outcomes if outcome.reason is not None)),
        }


def plan(config: RegenerationConfig) -> list[TaskReplays]:
    """The chosen tasks with their demonstrations, all read and checked.

    Raises ValueError or FileNotFoundError where flags or files cannot be used, or something else is where the dataset
    is to be; ModuleNotFoundError without h5py.
    """
    config.validate()
    suite = config.libero_task_suite
    indices = choose_indices(config.task_ids, get_suite(suite).get_num_tasks(), "task_ids")
    tasks = [load_task(suite, index) for index in indices]
    files = [file_of(config.libero_raw_data_dir, task) for task in tasks]
    replays = [TaskReplays(task, _chosen(config, file, task)) for task, file in zip(tasks, files, strict=True)]
    if config.dataset_dir.exists() and finished(config, replays) is None:
        raise ValueError(
            f"{config.dataset_dir} exists and was made with other settings or from other files; remove it or choose "
            "another --dataset_name"
        )
    if not config.dataset_dir.exists() and not is_writable(config.dataset_dir):
        raise ValueError(f"cannot write into {config.libero_target_dir.absolute()}; choose another --libero_target_dir")
    return replays


def finished(config: RegenerationConfig, replays: list[TaskReplays]) -> list[dict[str, Any]] | None:
    """The summary of the tasks if exactly this dataset is already there, else None."""
    try:
        stored = json.loads((config.dataset_dir / SUMMARY_FILE).read_text())
    except FileNotFoundError:
        return None
    return stored["tasks"] if stored["made_of"] == _made_of(config, replays) else None


def regenerate(
    config: RegenerationConfig, replays: list[TaskReplays], on_outcome: Callable[[LiberoTask, Outcome], None]
) -> None:
    """Replays what `plan` has found, and fills in the outcomes.

    Args:
        on_outcome: called in this process after each demonstration, also for those that an earlier run has done.

    Raises:
        RenderingUnavailable: before anything else, when no pictures can be drawn here.
        RuntimeError: when a simulator process dies; running again continues.
    """
    check_rendering()
    for one in replays:
        try:
            for number, outcome in _outcomes(config, one):
                one.outcomes[number] = outcome
                on_outcome(one.task, outcome)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a simulator process died at {one.task.suite} task {one.task.index} (out of memory?); run the same "
                "command again to continue, perhaps with a smaller --num_processes"
            ) from error


def write(config: RegenerationConfig, replays: list[TaskReplays]) -> Path:
    """Writes the RLDS dataset with its summary, removes the saved demonstrations, and returns the dataset's folder.

    Raises:
        ValueError: when no demonstration is left.
    """
    kept = [(one.task, it) for one in replays for it in one.kept]
    if not kept:
        reasons = Counter(outcome.reason for one in replays for outcome in one.outcomes.values())
        told = "; ".join(f"{reason} ({count}x)" for reason, count in reasons.items())
        raise ValueError(f"no demonstration succeeded again, so nothing was written: {told}")
    sizes = dict.fromkeys(CAMERAS, (config.resolution, config.resolution))
    description = f"LIBERO's demonstrations of {config.libero_task_suite}, replayed at {config.resolution} pixels."
    with RldsWriter(
        config.libero_target_dir, replace(LAYOUTS["libero"], name=config.name), sizes, description
    ) as writer:
        for task, it in kept:
            for episode in load_episodes(_stem(config, task, it).with_suffix(".npz")):
                writer.add(_new_episode(episode))
    summary = {"made_of": _made_of(config, replays), "tasks": [one.summary() for one in replays]}
    (writer.directory / STATES_FILE).write_text(json.dumps(_initial_states(replays)) + "\n")
    (writer.directory / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(config.cache_dir, ignore_errors=True)
    with contextlib.suppress(OSError):
        config.cache_dir.parent.rmdir()  # unless another regeneration has something there
    return writer.directory


def _chosen(config: RegenerationConfig, file: Path, task: LiberoTask) -> list[StoredDemonstration]:
    there = read_demonstrations(file, task)
    if config.demonstrations.strip() == "all":
        return there
    numbers = set(parse_indices(config.demonstrations, "demonstrations"))
    if missing := numbers - {it.number for it in there}:
        raise ValueError(f"--demonstrations {config.demonstrations!r}: {file} has no demo_{min(missing)}")
    return [it for it in there if it.number in numbers]


def _made_of(config: RegenerationConfig, replays: list[TaskReplays]) -> dict[str, Any]:
    hashes = "".join(it.sha256 for one in replays for it in one.demonstrations)
    return {"config": config.content(), "demonstrations_sha256": hashlib.sha256(hashes.encode()).hexdigest()}


def _initial_states(replays: list[TaskReplays]) -> dict[str, dict[str, Any]]:
    return {
        get_suite(one.task.suite).get_task(one.task.index).language.replace(" ", "_"): {
            it.name: {
                "success": one.outcomes[it.number].reason is None,
                "initial_state": it.initial_state.tolist(),
            }
            for it in one.demonstrations
        }
        for one in replays
    }


def _new_episode(episode: Episode) -> NewEpisode:
    pictures: dict[str, Any] = {"full_image": episode.images, "wrist_image": episode.wrist_images}
    source = episode.metadata["file_path"].removesuffix("/segment0")  # a replay is one segment
    return NewEpisode(pictures, episode.states, episode.actions, episode.language, source)


def _outcomes(config: RegenerationConfig, one: TaskReplays) -> Iterator[tuple[int, Outcome]]:
    """Outcomes as they come, those of an earlier, interrupted run first."""
    open_ones = []
    for it in one.demonstrations:
        if (saved := _saved(_stem(config, one.task, it))) is not None:
            yield it.number, saved
        else:
            open_ones.append(it)
    if not open_ones:
        return
    with contextlib.ExitStack() as stack:
        workers = min(config.num_processes, len(open_ones))
        pool = open_pool(stack, workers, one.task, config.environment_options)
        running = {pool.submit(_replay_one, config, it): it.number for it in open_ones}
        for future in as_completed(running):
            yield running[future], future.result()


def _saved(stem: Path) -> Outcome | None:
    """The file of the outcome comes last: where it is, the demonstration is whole."""
    try:
        return Outcome(**json.loads(stem.with_suffix(".json").read_text()))
    except FileNotFoundError:
        return None


def _stem(config: RegenerationConfig, task: LiberoTask, demonstration: StoredDemonstration) -> Path:
    return config.cache_dir / f"{task.suite}_{task.index}_{demonstration.name}_{demonstration.sha256[:12]}"


def _replay_one(config: RegenerationConfig, demonstration: StoredDemonstration) -> Outcome:
    """In a simulator process: replays, draws and saves one demonstration."""
    environment = worker_environment()
    stem = _stem(config, environment.task, demonstration)
    try:
        replayed = replay(environment, demonstration, config.drop_noops)
    except (ReplayFailed, SimulationUnstable) as failure:
        outcome = Outcome(0, 0, str(failure))
    else:
        recording = replayed.recording
        source = f"{environment.task.suite}/{demonstration.file.name}/{demonstration.name}"
        save_demonstration(environment, recording, stem.with_suffix(".npz"), source)
        outcome = Outcome(len(recording.actions), replayed.dropped)
    with replacing(stem.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(vars(outcome)))
    return outcome
