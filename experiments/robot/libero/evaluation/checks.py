"""What can be said against the flags before anything is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import fields

from experiments.robot.libero.policies.checkpoint import quantization_of
from experiments.robot.libero.settings.controls import CONTROLS, TOKEN_CONTROLS
from experiments.robot.libero.settings.flags import EvaluationConfig, parse_shard, protocol_of
from experiments.robot.libero.settings.suite_names import perturbed, suites_of
from experiments.robot.libero.simulator.renderer import MIN_RESOLUTION, RENDERERS
from prismatic.extern.hf.configuration_prismatic import HEAD_KINDS
from prismatic.inference.engine import check_engine
from prismatic.models.precision import DTYPES
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.training.wandb_account import check_wandb

MAX_SEED = 2**31 - 1
MAX_RESOLUTION = 4096
CHECKPOINT_FLAGS = (
    "pretrained_checkpoint",
    "use_l1_regression",
    "use_diffusion",
    "num_diffusion_steps_train",
    "num_diffusion_steps_inference",
    "use_film",
    "num_images_in_input",
    "use_proprio",
    "center_crop",
    "unnorm_key",
    "load_in_8bit",
    "load_in_4bit",
    "load_in_fp8",
    "pruner",
    "action_readout",
    "action_head",
    "device",
    "dtype",
    "engine",
)
"""Flags about a checkpoint that this process loads."""
MAX_TIMEOUT_S = 10**7
"""As long as one may wait for a reply; the clocks of operating systems end somewhere."""
REMOTE_FLAGS = ("policy_convention",)


def check_remote_flags(config: EvaluationConfig) -> None:
    """Raises ValueError for flags of a checkpoint with a server and the other way round; ImportError for want of it."""
    defaults = {field.name: field.default for field in fields(config)}
    foreign = REMOTE_FLAGS if config.policy_url is None else CHECKPOINT_FLAGS
    given = [name for name in foreign if getattr(config, name) != defaults[name]]
    if config.policy_url is None:
        if given:
            raise ValueError(f"--{given[0]} is about a policy server; give its address by --policy_url ws://host:port")
        return
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"{flags}: for a checkpoint, not for the server of --policy_url; leave out, and set it there")
    if config.control in TOKEN_CONTROLS:
        raise ValueError(f"--control {config.control} needs the policy in this process: give --pretrained_checkpoint")
    if missing := [name for name in ("websockets", "msgpack") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"--policy_url needs {' and '.join(missing)}: pip install 'lightvla[serve]'")


def _check_policy_flags(config: EvaluationConfig) -> None:
    """Raises ValueError for what the flags say of the policy: where it is, its head, pruner and weights."""
    if not config.pretrained_checkpoint and config.policy_url is None:
        raise ValueError("--pretrained_checkpoint is missing: give a checkpoint folder or a hub id such as user/name")
    if config.use_l1_regression is not False and config.use_diffusion:
        raise ValueError("--use_l1_regression and --use_diffusion exclude each other; set one of them to False")
    if config.action_head not in ("auto", *HEAD_KINDS):
        raise ValueError(f"unknown --action_head {config.action_head!r}; known: auto, {', '.join(HEAD_KINDS)}")
    if config.use_diffusion and config.action_head not in ("auto", "diffusion"):
        raise ValueError(f"--use_diffusion True and --action_head {config.action_head} exclude each other; give one")
    if config.pruner is not None:
        PrunerSpec.parse(config.pruner)
    if config.control in TOKEN_CONTROLS and config.pruner is not None:
        raise ValueError(
            f"--control {config.control} changes what the checkpoint's own pruner chooses, and --pruner "
            f"{config.pruner} takes that pruner's place: leave one of the two out"
        )
    quantization_of(config)


def check_flags(config: EvaluationConfig) -> None:
    """Raises ValueError for flags that contradict each other, are out of range, or ask for what is not there yet."""
    check_remote_flags(config)
    if not 0 < config.policy_timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(
            f"--policy_timeout_s {config.policy_timeout_s}: expected seconds, more than 0 and at most {MAX_TIMEOUT_S}"
        )
    _check_policy_flags(config)
    for flag, known in (("control", CONTROLS), ("renderer", RENDERERS)):
        if getattr(config, flag) not in known:
            raise ValueError(f"unknown --{flag} {getattr(config, flag)!r}; known: {', '.join(known)}")
    for suite in suites_of(config.task_suite_name):
        if config.perturbation is not None:
            perturbed(suite, config.perturbation)
    protocol_of(config)
    if config.shard is not None:
        parse_shard(config.shard)
    if config.dtype not in (None, "auto", *DTYPES):
        raise ValueError(f"unknown --dtype {config.dtype!r}; known: auto, {', '.join(DTYPES)}")
    check_engine(config.engine)
    counts = ("num_trials_per_task", "video_every_steps", "num_open_loop_steps", "num_images_in_input", "num_envs")
    diffusion = ("num_diffusion_steps_train", "num_diffusion_steps_inference")
    for flag in (*counts, *diffusion, "batch_size", "max_attempts", "max_policy_failures"):
        if getattr(config, flag) is not None and getattr(config, flag) < 1:
            raise ValueError(f"--{flag} {getattr(config, flag)}: expected at least 1")
    if config.num_steps_wait < 0 or config.wide_starts_m < 0:
        raise ValueError("--num_steps_wait and --wide_starts_m must not be negative")
    for flag, low, high in (
        ("worker_timeout_s", 0.1, MAX_TIMEOUT_S),
        ("seed", 0, MAX_SEED),
        ("env_img_res", MIN_RESOLUTION, MAX_RESOLUTION),
    ):
        value = getattr(config, flag)
        if not low <= value <= high:
            raise ValueError(f"--{flag} {value}: expected {low} to {high}")
    if config.render_every_step and config.control == "blank_images":
        raise ValueError("--render_every_step has nothing to draw under --control blank_images; leave it out")
    if config.resume and config.output_dir is None:
        raise ValueError("--resume needs --output_dir: the folder of the evaluation to go on with")
    if config.force and not config.resume:
        raise ValueError("--force True goes on with another evaluation's rollouts: it needs --resume True")
    if config.save_rollout_video not in (True, False, "failures"):
        raise ValueError(f"--save_rollout_video {config.save_rollout_video!r}: expected True, False or failures")
    if config.save_rollout_video and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError("--save_rollout_video needs imageio-ffmpeg: pip install 'imageio[ffmpeg]'")
    if config.use_wandb:
        check_wandb()
