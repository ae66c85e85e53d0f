"""What an evaluation will roll out, checked before any long work."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.robot.libero.evaluation import conventions
from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.results.journal import read_evaluation
from experiments.robot.libero.results.results import FILE_NAME
from experiments.robot.libero.rollouts.rollout import Probes
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.settings.flags import OWN_STATES, EvaluationConfig, parse_indices, parse_shard
from experiments.robot.libero.settings.suite_names import suites_of
from experiments.robot.libero.simulator.backend import check_rendering, simulator
from experiments.robot.libero.simulator.states_file import read_initial_states
from experiments.robot.libero.simulator.surroundings import is_writable
from experiments.robot.libero.simulator.tasks import LiberoTask, get_suite, load_task
from experiments.robot.libero.simulator.wide_starts import Displacement


@dataclass(frozen=True)
class Plan:
    """What will be rolled out: `starts` task by task, and how; `warnings` are for whoever reads the results.

    `probes` ask more of the policy than an evaluation does; None: nothing more.
    """

    config: EvaluationConfig
    starts: list[list[Start]]
    max_steps: int
    renders: bool
    backend: str
    output_dir: Path
    warnings: list[str]
    probes: Probes | None = None


def make_plan(config: EvaluationConfig) -> Plan:
    """Check everything that needs no model, and lay out the starts.

    Raises:
        ValueError: as `check_flags`; for unknown tasks or initial states, naming what exists; for the control
            `swapped_instruction` without two tasks that share a scene; for a folder that cannot be written.
        RenderingUnavailable: when pictures are needed and cannot be drawn here.
    """
    check_flags(config)
    tasks = [load_task(*task) for suite in suites_of(config.task_suite_name) for task in chosen_tasks(config, suite)]
    others = swap_partners(tasks) if config.control == "swapped_instruction" else [None] * len(tasks)
    starts = [starts_of(config, task, other) for task, other in zip(tasks, others, strict=True)]
    warnings = [*missing_trials(config, tasks, starts), *unmoved(config, starts)]
    starts = starts if config.shard is None else shard_of(starts, *parse_shard(config.shard))
    videos = config.save_rollout_video and config.max_videos_per_task != 0
    renders = videos or config.control != "blank_images"
    output_dir = output_directory(config)
    if not is_writable(output_dir):
        raise ValueError(f"cannot write into {output_dir.absolute()}; choose another --output_dir or --local_log_dir")
    check_folder(output_dir, config.resume)
    backend = check_rendering() if renders else "none"
    return Plan(config, starts, conventions.max_steps(config), renders, backend, output_dir, warnings)


def chosen_tasks(config: EvaluationConfig, suite: str) -> list[tuple[str, int]]:
    """Suite and index of the tasks of a suite that the flags ask for."""
    count = get_suite(suite).get_num_tasks()
    indices = list(range(count)) if config.task_ids is None else parse_indices(config.task_ids, "task_ids")
    if unknown := [index for index in indices if index >= count]:
        raise ValueError(f"--task_ids: {suite} has no task {unknown[0]}; expected 0 to {count - 1}")
    return [(suite, index) for index in indices]


def shard_of(starts: Sequence[Sequence[Start]], part: int, parts: int) -> list[list[Start]]:
    """Of all starts, task by task, those numbered part, part + parts, ... from 1: about as many of every task."""
    places = itertools.count(1)
    return [[start for start in task if next(places) % parts == part % parts] for task in starts]


def check_folder(folder: Path, resume: bool) -> None:
    """Raises ValueError for a folder with rollouts that nobody asked to go on with, or that nothing says the origin of.

    An evaluation that was stopped before its first rollout is in nobody's way.
    """
    try:
        before = read_evaluation(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"--output_dir {folder} holds rollouts of an earlier evaluation but no {FILE_NAME}, which would say of "
            "which policy and flags; put it back, or choose another folder"
        ) from error
    if before is not None and before.episodes and not resume:
        raise ValueError(
            f"--output_dir {folder} holds rollouts of an earlier evaluation; go on with them by --resume True, or "
            "choose another folder"
        )


def missing_trials(
    config: EvaluationConfig, tasks: Sequence[LiberoTask], starts: Sequence[Sequence[Start]]
) -> list[str]:
    """What to say where a file of initial states has fewer initial states than were asked for."""
    if config.initial_states is not None:
        return []
    wanted, file = config.num_trials_per_task, config.initial_states_path
    return [
        f"task {task.index}: {len(given)} of {wanted} trials: {file} has no more successful entries up to "
        f"demo_{wanted - 1}"
        for task, given in zip(tasks, starts, strict=True)
        if len(given) < wanted
    ]


def swap_partners(tasks: Sequence[LiberoTask]) -> list[LiberoTask | None]:
    """For every task the next one, round the circle, that lives in the same scene and wants something else."""
    partners: list[LiberoTask | None] = []
    for position, task in enumerate(tasks):
        following = [*tasks[position + 1 :], *tasks[:position]]
        partner = next((t for t in following if scene_of(t) == scene_of(task) and t.goal != task.goal), None)
        if partner is None:
            raise ValueError(
                f"--control swapped_instruction: task {task.index} ({task.language!r}) shares its scene with no other "
                "selected task; choose several tasks of libero_goal by --task_ids"
            )
        partners.append(partner)
    return partners


def scene_of(task: LiberoTask) -> str:
    """What two tasks must have in common for one's goal to be reachable in the other's simulation."""
    problem = simulator().parse_problem(str(task.bddl_file))
    return json.dumps([problem["problem_name"], problem["fixtures"], problem["objects"]], sort_keys=True)


def unmoved(config: EvaluationConfig, starts: Sequence[Sequence[Start]]) -> list[str]:
    """What to say of tasks in which wide starts move nothing.

    Raises:
        ValueError: where such a task's initial states are gone round more than once: the rollouts would be the same.
    """
    if not config.wide_starts_m:
        return []
    still = [of_task for of_task in starts if of_task and not names_an_object(of_task[0].task)]
    for of_task in still:
        task, states = of_task[0].task, len({start.initial_state for start in of_task})
        if len(of_task) > states:
            raise ValueError(
                f"--wide_starts_m moves nothing in {task.suite} task {task.index} ({task.language!r}): its goal names "
                f"fixtures alone, so {len(of_task)} trials of {states} initial states would repeat rollouts; ask for "
                f"at most {states}, or leave the task out by --task_ids"
            )
    return [
        f"{of_task[0].task.suite} task {of_task[0].task.index}: --wide_starts_m moves nothing, since its goal names "
        "fixtures alone; its starts are standard ones"
        for of_task in still
    ]


def names_an_object(task: LiberoTask) -> bool:
    """Whether the goal names a thing that is no fixture, or a region of one."""
    objects = simulator().parse_problem(str(task.bddl_file))["objects"].values()
    names = [name for kind in objects for name in kind]
    places = [place for predicate in task.goal for place in predicate[1:]]
    return any(place == name or place.startswith(f"{name}_") for place in places for name in names)


def starts_of(config: EvaluationConfig, task: LiberoTask, other: LiberoTask | None) -> list[Start]:
    """The starts of one task, in order."""
    if config.initial_states_path != OWN_STATES:
        states = read_initial_states(config.initial_states_path, task)
    else:
        states = dict(enumerate(task.init_states))
    available = list(states)
    if config.initial_states is not None:
        chosen = parse_indices(config.initial_states, "initial_states")
        if unknown := [index for index in chosen if index not in states]:
            raise ValueError(
                f"--initial_states: task {task.index} has no initial state {unknown[0]}; it has {len(states)}"
            )
        available = chosen
        if config.trials_of_states is not None:
            chosen = gone_round(config, available)
    elif config.initial_states_path != OWN_STATES and not config.wide_starts_m:
        # As OpenVLA-OFT counts: failed demonstrations count as trials that are left out.
        chosen = [index for index in available if index < config.num_trials_per_task]
        if not chosen:
            raise ValueError(
                f"--num_trials_per_task {config.num_trials_per_task}: {config.initial_states_path} has no successful "
                f"entry of task {task.index} before demo_{config.num_trials_per_task}; it has {available}"
            )
    elif config.num_trials_per_task > len(available) and not config.wide_starts_m:
        raise ValueError(
            f"--num_trials_per_task {config.num_trials_per_task}: task {task.index} has {len(available)} states, "
            "and repeating one says nothing new; lower it, or ask for --wide_starts_m"
        )
    else:
        chosen = [available[trial % len(available)] for trial in range(config.num_trials_per_task)]
    starts = []
    for trial, index in enumerate(chosen):
        displacement = None
        if config.wide_starts_m:
            repetition = trial // len(available)
            displacement = Displacement(config.wide_starts_m, config.seed, split="evaluation", trial=repetition)
        starts.append(
            Start(
                task=task,
                instruction=(other or task).language,
                initial_state=index,
                trial=trial,
                seed=conventions.reset_seed(config, trial),
                displacement=displacement,
                state=states[index],
                other=other,
                max_steps=conventions.max_steps(config, task.suite),
            )
        )
    return starts


def gone_round(config: EvaluationConfig, states: Sequence[int]) -> list[int]:
    """The named initial states again and again, in order, up to the number of trials that was asked for with them."""
    trials = config.num_trials_per_task
    if trials > len(states) and not config.wide_starts_m:
        raise ValueError(
            f"--num_trials_per_task {trials} with the {len(states)} of --initial_states {config.initial_states} would "
            "repeat the same rollouts; name more states, ask for fewer trials, or displace objects by --wide_starts_m"
        )
    return [states[trial % len(states)] for trial in range(trials)]


def output_directory(config: EvaluationConfig) -> Path:
    """Where results and videos go."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    parts = ["EVAL", config.task_suite_name.replace(",", "+"), config.model_family, time.strftime("%Y_%m_%d-%H_%M_%S")]
    return Path(config.local_log_dir) / ("-".join(parts) + (f"--{config.run_id_note}" if config.run_id_note else ""))
