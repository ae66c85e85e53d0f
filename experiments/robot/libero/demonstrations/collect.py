"""Collects demonstrations: experts in parallel simulator processes, pictures afterwards, one RLDS dataset at the end.

Every start is simulated without drawing. Only a success is drawn, from its recorded joint positions, and saved as one
file under `<output_dir>/.collect`, so that an interrupted collection continues where it stopped. A demonstration with
pushes is cut at them into segments that become RLDS episodes of their own: no action of a push is ever a target.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.robot.libero.demonstrations.config import CollectionConfig, choose_indices
from experiments.robot.libero.demonstrations.demonstration import Mistakes, Pushes, demonstrate
from experiments.robot.libero.demonstrations.experts import ATTEMPTS, ExpertFailed
from experiments.robot.libero.demonstrations.files import load_episodes, save_demonstration
from experiments.robot.libero.demonstrations.pool import open_pool, worker_environment
from experiments.robot.libero.demonstrations.rlds_writer import write_rlds
from experiments.robot.libero.simulator.backend import check_rendering
from experiments.robot.libero.simulator.environment import SimulationUnstable
from experiments.robot.libero.simulator.surroundings import is_writable
from experiments.robot.libero.simulator.tasks import LiberoTask, get_suite, load_task

SUMMARY_FILE = "collection.json"
_HOPELESS = 5
"""A task none of whose first starts was solved is given up after so many."""
_STARTS_PER_DEMO = 3


@dataclass(frozen=True)
class Candidate:
    """One start that may become a demonstration; `trial` tells apart the random draws on one initial state."""

    initial_state: int
    trial: int

    @property
    def name(self) -> str:
        return f"state{self.initial_state:03d}_trial{self.trial}"


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate: the file of a success, or why each attempt failed."""

    candidate: Candidate
    file: Path | None
    reasons: tuple[str, ...] = ()


@dataclass
class TaskResult:
    """All outcomes of one task, in the order of its candidates, and how many demonstrations it shall have."""

    task: LiberoTask
    wanted: int
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        return [outcome.file for outcome in self.outcomes if outcome.file is not None]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.file is None]

    def summary(self) -> dict[str, object]:
        """For JSON: how many were solved, which starts were not, and why."""
        return {
            "suite": self.task.suite,
            "task": self.task.index,
            "language": self.task.language,
            "bddl_sha256": self.task.bddl_sha256,
            "init_states_sha256": self.task.init_states_sha256,
            "wanted": self.wanted,
            "demonstrations": len(self.files),
            "unsolved": [outcome.candidate.name for outcome in self.failed],
            "reasons": dict(Counter(reason for outcome in self.failed for reason in outcome.reasons)),
        }


def plan(config: CollectionConfig) -> list[LiberoTask]:
    """The chosen tasks; raises ValueError where the configuration does not fit LIBERO or what is on disk."""
    config.validate()
    tasks = []
    for suite in (name.strip() for name in config.task_suite_name.split(",")):
        count = get_suite(suite).get_num_tasks()
        tasks += [load_task(suite, index) for index in choose_indices(config.task_ids, count, "task_ids")]
    for task, wanted in zip(tasks, config.demonstrations(len(tasks)), strict=True):
        starts = len(choose_indices(config.initial_states, len(task.init_states), "initial_states"))
        if wanted > starts and not config.randomised:
            raise ValueError(
                f"{wanted} demonstrations per task need as many initial states, and {starts} are "
                "chosen; choose more, or ask for wide starts or recovery pushes, which differ each time"
            )
    if config.dataset_dir.exists() and finished(config) is None:
        raise ValueError(
            f"{config.dataset_dir} exists and was made with other settings; remove it or choose another dataset_name"
        )
    if not config.dataset_dir.exists() and not is_writable(config.dataset_dir):
        raise ValueError(f"cannot write into {config.output_dir.absolute()}; choose another --output_dir")
    return tasks


def finished(config: CollectionConfig) -> list[dict[str, object]] | None:
    """The summary of the tasks if exactly this dataset is already there, else None."""
    try:
        stored = json.loads((config.dataset_dir / SUMMARY_FILE).read_text())
    except FileNotFoundError:
        return None
    return stored["tasks"] if stored["config"] == config.content() else None


def collect(
    config: CollectionConfig, tasks: list[LiberoTask], on_outcome: Callable[[LiberoTask, Outcome], None]
) -> list[TaskResult]:
    """Simulates and draws until every task has its demonstrations or its starts are used up.

    Args:
        tasks: from `plan`.
        on_outcome: called in this process after each start, also for those that an earlier run has done.

    Raises:
        RenderingUnavailable: before anything else, when no pictures can be drawn here.
        RuntimeError: when a simulator process dies; running again continues.
    """
    check_rendering()
    results = []
    for task, wanted in zip(tasks, config.demonstrations(len(tasks)), strict=True):
        result = TaskResult(task, wanted)
        try:
            for outcome in _outcomes(config, task, wanted):
                result.outcomes.append(outcome)
                on_outcome(task, outcome)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a simulator process died at {task.suite} task {task.index} (out of memory?); run the same command "
                "again to continue, perhaps with a smaller num_processes"
            ) from error
        result.outcomes.sort(key=lambda outcome: (outcome.candidate.trial, outcome.candidate.initial_state))
        results.append(result)
    return results


def write(config: CollectionConfig, results: list[TaskResult]) -> Path:
    """Writes the RLDS dataset with its summary, removes the saved demonstrations, and returns the dataset's folder.

    Raises:
        ValueError: when there is no demonstration at all.
    """
    episodes = (episode for result in results for file in result.files for episode in load_episodes(file))
    description = f"Scripted demonstrations of {config.task_suite_name}, collected in simulation."
    folder = write_rlds(config.output_dir, config.dataset_name, episodes, config.resolution, description)
    summary = {"config": config.content(), "tasks": [result.summary() for result in results]}
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(config.cache_dir, ignore_errors=True)
    with contextlib.suppress(OSError):
        config.cache_dir.parent.rmdir()  # unless another collection has something there
    return folder


def _candidates(config: CollectionConfig, task: LiberoTask, wanted: int) -> list[Candidate]:
    states = choose_indices(config.initial_states, len(task.init_states), "initial_states")
    trials = -(-_STARTS_PER_DEMO * wanted // len(states)) if config.randomised else 1
    return [Candidate(state, trial) for trial, state in itertools.product(range(trials), states)]


def _outcomes(config: CollectionConfig, task: LiberoTask, wanted: int) -> Iterator[Outcome]:
    """Tries starts in order, never more at once than demonstrations are missing: the choice depends on no timing."""
    remaining = iter(_candidates(config, task, wanted))
    solved = failed = 0
    running: set[Future[Outcome]] = set()
    with contextlib.ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None
        while solved < wanted and (solved or failed < _HOPELESS):
            done: list[Outcome] = []
            for candidate in itertools.islice(remaining, wanted - solved - len(running)):
                if (saved := _saved(config, task, candidate)) is not None:
                    done.append(saved)
                    continue
                pool = pool or open_pool(stack, min(config.num_processes, wanted), task, config.environment_options)
                running.add(pool.submit(_try_candidate, config, candidate))
            if not done and not running:
                return
            if not done:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                done = [future.result() for future in ended]
            solved += sum(outcome.file is not None for outcome in done)
            failed += sum(outcome.file is None for outcome in done)
            yield from done


def _saved(config: CollectionConfig, task: LiberoTask, candidate: Candidate) -> Outcome | None:
    """What an earlier, interrupted run found out about a candidate."""
    stem = _stem(config, task, candidate)
    if (file := stem.with_suffix(".npz")).exists():
        return Outcome(candidate, file)
    if (file := stem.with_suffix(".json")).exists():
        return Outcome(candidate, None, tuple(json.loads(file.read_text())))
    return None


def _stem(config: CollectionConfig, task: LiberoTask, candidate: Candidate) -> Path:
    return config.cache_dir / f"{task.suite}_{task.index}_{candidate.name}"


# In a simulator process


def _try_candidate(config: CollectionConfig, candidate: Candidate) -> Outcome:
    """Simulates a start until an attempt succeeds, then draws and saves it."""
    environment = worker_environment()
    task = environment.task
    stem = _stem(config, task, candidate)
    stem.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    # Where a start after a mistake cannot be solved, the same attempt is made without one.
    ways = (Mistakes(), None) if config.recovery_mistakes else (None,)
    for number, (attempt, mistakes) in enumerate(itertools.product(range(ATTEMPTS), ways)):
        displacement = config.displacement(candidate.initial_state, candidate.trial)
        environment.reset(candidate.initial_state, displacement=displacement)
        where = (zlib.crc32(f"{task.suite}/{task.name}".encode()), candidate.initial_state, candidate.trial, number)
        pushes = Pushes() if config.recovery_pushes else None
        try:
            rng = np.random.default_rng([config.seed, *where])
            recording = demonstrate(environment, attempt, rng, pushes, config.steps_past_success, mistakes)
        except (ExpertFailed, SimulationUnstable) as failure:
            reasons.append(str(failure))
            continue
        file = stem.with_suffix(".npz")
        save_demonstration(environment, recording, file)
        return Outcome(candidate, file)
    stem.with_suffix(".json").write_text(json.dumps(reasons))
    return Outcome(candidate, None, tuple(reasons))
