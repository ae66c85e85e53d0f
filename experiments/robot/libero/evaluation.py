"""An evaluation: the plan, which is checked before any long work, and the loop over its tasks and starts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.robot.libero import protocols
from experiments.robot.libero.agents import Agent
from experiments.robot.libero.config import DTYPES, EvaluationConfig, check_flags, parse_indices, quantization_of
from experiments.robot.libero.environment import (
    CAMERAS,
    LiberoEnvironment,
    LiberoTask,
    check_rendering,
    get_suite,
    load_task,
)
from experiments.robot.libero.initial_states import read_initial_states
from experiments.robot.libero.results import FILE_NAME, EpisodeRecord, Results, collect_versions, git_commit
from experiments.robot.libero.rollout import RolloutRecorder, RolloutSettings, Start, run_episode
from experiments.robot.libero.simulator import simulator
from experiments.robot.libero.starts import Displacement
from experiments.robot.libero.suites import SUITES
from prismatic.checkpoint import STATISTICS_FILE, resolve
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be rolled out: `starts` task by task, and how."""

    config: EvaluationConfig
    starts: list[list[Start]]
    max_steps: int
    renders: bool
    backend: str
    output_dir: Path


def make_plan(config: EvaluationConfig) -> Plan:
    """Check everything that needs no model, and lay out the starts.

    Raises:
        ValueError: as `check_flags`; for unknown tasks or initial states, naming what exists; for the control
            `swapped_instruction` without two tasks that share a scene.
        RenderingUnavailable: when pictures are needed and cannot be drawn here.
    """
    check_flags(config)
    suite = config.task_suite_name
    count = get_suite(suite).get_num_tasks()
    indices = list(range(count)) if config.task_ids is None else parse_indices(config.task_ids, "task_ids")
    if unknown := [index for index in indices if index >= count]:
        raise ValueError(f"--task_ids: {suite} has no task {unknown[0]}; expected 0 to {count - 1}")
    tasks = [load_task(suite, index) for index in indices]
    others = swap_partners(tasks) if config.control == "swapped_instruction" else [None] * len(tasks)
    starts = [starts_of(config, task, other) for task, other in zip(tasks, others, strict=True)]
    videos = config.save_rollout_video and config.max_videos_per_task != 0
    renders = videos or config.control != "blank_images"
    backend = check_rendering() if renders else "none"
    return Plan(config, starts, protocols.max_steps(config), renders, backend, output_directory(config))


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


def starts_of(config: EvaluationConfig, task: LiberoTask, other: LiberoTask | None) -> list[Start]:
    """The starts of one task, in order."""
    if config.initial_states_path != "DEFAULT":
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
    elif config.initial_states_path != "DEFAULT" and not config.wide_starts_m:
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
                seed=protocols.reset_seed(config, trial),
                displacement=displacement,
                state=states[index],
                other=other,
            )
        )
    return starts


def output_directory(config: EvaluationConfig) -> Path:
    """Where results and videos go."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    parts = ["EVAL", config.task_suite_name, config.model_family, time.strftime("%Y_%m_%d-%H_%M_%S")]
    return Path(config.local_log_dir) / ("-".join(parts) + (f"--{config.run_id_note}" if config.run_id_note else ""))


def load_policy(config: EvaluationConfig) -> Policy:
    """Load the checkpoint as the flags ask.

    Raises:
        FileNotFoundError, ValueError: as `Policy.from_pretrained`; and when the flags ask for another number of images
            than the checkpoint was trained with, more actions than a chunk has, or a robot that is not LIBERO's.
    """
    directory = resolve(config.pretrained_checkpoint)
    recorded = _read_json(directory / "config.json").get("num_images_in_input")
    if None not in (recorded, config.num_images_in_input) and recorded != config.num_images_in_input:
        raise ValueError(
            f"--num_images_in_input {config.num_images_in_input}: {directory} was trained with {recorded}; "
            "leave the flag out"
        )
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    policy = Policy.from_pretrained(
        config.pretrained_checkpoint,
        device=device,
        dtype=DTYPES[config.dtype] if config.dtype else None,
        unnorm_key=config.unnorm_key or _suite_key(directory, config.task_suite_name),
        pruner=config.pruner,
        action_readout=config.action_readout,
        center_crop=config.center_crop,
        num_images_in_input=config.num_images_in_input,
        use_proprio=config.use_proprio,
        head="l1" if config.use_l1_regression else "diffusion" if config.use_diffusion else "discrete",
        use_film=config.use_film,
        quantization=quantization_of(config),
    )
    if isinstance(policy.action_head, DiffusionActionHead):
        if config.num_diffusion_steps_inference > policy.action_head.num_train_steps:
            raise ValueError(
                f"--num_diffusion_steps_inference {config.num_diffusion_steps_inference}: {directory} was trained with "
                f"{policy.action_head.num_train_steps} steps; give at most as many"
            )
        policy.action_head.num_inference_steps = config.num_diffusion_steps_inference
    robot = policy.robot
    if missing := set(robot.cameras) - set(CAMERAS):
        raise ValueError(
            f"{directory} drives robot {robot.name!r}, whose cameras {sorted(missing)} LIBERO does not have"
        )
    if (config.num_open_loop_steps or 1) > robot.chunk_length:
        raise ValueError(
            f"--num_open_loop_steps {config.num_open_loop_steps}: a chunk has {robot.chunk_length} actions"
        )
    if config.control == "random_tokens":
        policy.set_pruner(f"random:seed={config.seed}")
    return policy


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _suite_key(directory: Path, suite: str) -> str | None:
    """The suite's own statistics among several, or its base's; None leaves the choice to the policy."""
    known = _read_json(directory / STATISTICS_FILE) or _read_json(directory / "config.json").get("norm_stats") or {}
    base = SUITES[suite].base
    return next((key for key in (suite, f"{suite}_no_noops", base, f"{base}_no_noops") if key in known), None)


def evaluate(
    plan: Plan, agent: Agent, command: Sequence[str], on_episode: Callable[[EpisodeRecord], None] | None = None
) -> Results:
    """Roll out every start, one after the other, writing `results.json` after each.

    Args:
        command: The command line, for the record.
        on_episode: Called after every rollout, for a progress bar.
    """
    config = plan.config
    description = agent.description()
    settings = RolloutSettings(
        max_steps=plan.max_steps,
        open_loop_steps=config.num_open_loop_steps or agent.robot.open_loop_steps,
        control=config.control,
        blank_images=config.control == "blank_images",
        cameras=agent.cameras,
    )
    versions = collect_versions()
    results = Results(
        run={
            "command": list(command),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git_commit": git_commit(),
            "device": description.get("device_name", "unknown"),
            "renderer": config.renderer,
            "rendering_backend": plan.backend,
            "seed": config.seed,
            "protocol": protocols.describe(config, settings.max_steps, settings.open_loop_steps, agent.center_crop),
            "warnings": protocols.version_warnings(versions),
            "complete": False,
        },
        config=asdict(config),
        policy=description,
        versions=versions,
    )
    began = time.perf_counter()
    for starts in plan.starts:
        for record in _evaluate_task(plan, agent, starts, settings):
            results.episodes.append(record)
            results.run["seconds"] = round(time.perf_counter() - began, 1)
            results.save(plan.output_dir / FILE_NAME)
            if on_episode is not None:
                on_episode(record)
    results.run["complete"] = True
    results.save(plan.output_dir / FILE_NAME)
    return results


def _evaluate_task(
    plan: Plan, agent: Agent, starts: Sequence[Start], settings: RolloutSettings
) -> Iterator[EpisodeRecord]:
    environment: LiberoEnvironment | None = None
    try:
        for start in starts:
            if environment is None:
                environment = _make_environment(plan, agent, start.task)
            recorder = _make_recorder(plan, agent, start)
            record = run_episode(environment, agent, start, settings, recorder)
            if recorder is not None and recorder.frames:
                record.video = f"videos/{video_name(record)}"
                recorder.save(plan.output_dir / record.video)
            if record.invalid is not None:
                reason = record.invalid.strip().splitlines()[-1]
                logger.warning("task %d, trial %d is invalid: %s", record.task_index, record.trial, reason)
                # The error may have left the simulator in any state.
                environment.close()
                environment = None
            yield record
    finally:
        if environment is not None:
            environment.close()


def _make_environment(plan: Plan, agent: Agent, task: LiberoTask) -> LiberoEnvironment:
    return LiberoEnvironment(
        task,
        resolution=plan.config.env_img_res,
        render=plan.renders,
        seed=plan.config.seed,
        renderer=plan.config.renderer,
        settle_steps=plan.config.num_steps_wait,
        canonical_quaternion=agent.robot.canonical_quaternion,
    )


def _make_recorder(plan: Plan, agent: Agent, start: Start) -> RolloutRecorder | None:
    config = plan.config
    limit = config.max_videos_per_task
    if not config.save_rollout_video or (limit is not None and start.trial >= limit):
        return None
    return RolloutRecorder(
        title=start.instruction,
        every_steps=config.video_every_steps,
        center_crop=agent.center_crop,
        control_rate_hz=agent.robot.control_rate_hz,
    )


def video_name(record: EpisodeRecord) -> str:
    """`task1_state30_trial0_success.mp4`."""
    outcome = {True: "success", False: "failure", None: "invalid"}[record.success]
    return f"task{record.task_index}_state{record.initial_state}_trial{record.trial}_{outcome}.mp4"
