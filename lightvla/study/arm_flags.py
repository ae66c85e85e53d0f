"""What can be said against the flags of a study's arms before anything long is begun."""

import shlex
from dataclasses import fields

from experiments.robot.libero.settings.controls import CONTROLS
from experiments.robot.libero.settings.flags import EvaluationConfig
from lightvla.study.definition import COUNT, Arm, Study
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.training.config import FinetuneConfig

_OF_THE_STUDY = {
    "trained": frozenset(
        {"vla_path", "data_root_dir", "dataset_name", "run_root_dir", "run_id_override", "batch_size"}
        | {"learning_rate", "max_steps", "seed", "resume", "dry_run", "grad_accumulation_steps"}
        | {"dataset_spec", "robot", "gripper", "use_val_set", "val_fraction"}
        | {"save_freq", "save_latest_checkpoint_only", "keep_last"}
    ),
    "evaluated": frozenset(
        {"pretrained_checkpoint", "policy_url", "task_suite_name", "task_ids", "initial_states", "num_trials_per_task"}
        | {
            "perturbation",
            "wide_starts_m",
            "env_img_res",
            "renderer",
            "seed",
            "resume",
            "force",
            "report",
            "output_dir",
            "shard",
            "initial_states_path",
            "num_steps_wait",
            "protocol",
            "num_envs",
            "batch_size",
            "engine",
        }
    ),
}
"""Flags that the study gives itself, alike for all arms: else arms would differ in more than what they are about."""


def check_arms(study: Study) -> None:
    """Raises ValueError naming the arm and its flag."""
    for arm in study.arms:
        _check(arm)


def _check(arm: Arm) -> None:
    trained = arm.kind == "trained"
    command = "lightvla finetune" if trained else "lightvla eval"
    known = {field.name for field in fields(FinetuneConfig if trained else EvaluationConfig)}
    own = _OF_THE_STUDY["trained" if trained else "evaluated"]
    words = shlex.split(arm.flags)
    if len(words) % 2 or any(not word.startswith("--") for word in words[::2]):
        raise ValueError(f"arm {arm.name}: flags {arm.flags!r}: expected pairs as --pruner none")
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name = flag.removeprefix("--")
        if name not in known:
            raise ValueError(f"arm {arm.name}: {command} has no flag {flag}; see {command} --help")
        if name in own:
            raise ValueError(f"arm {arm.name}: {flag} is the study's, the same for all arms; leave it out")
        if name == "pruner":
            PrunerSpec.parse(value.replace(COUNT, "1"))
        if name == "control" and value not in CONTROLS:
            raise ValueError(f"arm {arm.name}: unknown --control {value}; known: {', '.join(CONTROLS)}")
