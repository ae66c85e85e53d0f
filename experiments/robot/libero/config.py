"""The flags of `run_libero_eval.py`, and what can be said against them before anything is loaded."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from experiments.robot.libero import protocols, suites
from experiments.robot.libero.environment import RENDERERS
from experiments.robot.libero.remote_flags import MAX_TIMEOUT_S, check_remote_flags
from experiments.robot.libero.simulator import MIN_RESOLUTION
from prismatic.extern.hf.configuration_prismatic import HEAD_KINDS
from prismatic.models.precision import DTYPES
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.quantization import check_quantization
from prismatic.training.wandb_account import check_wandb

CONTROLS = ("none", "blank_images", "swapped_instruction", "random_tokens")
MAX_SEED = 2**31 - 1
MAX_RESOLUTION = 4096

# A flag that was left out; `__post_init__` puts a number in its place.
_BY_PROTOCOL: Any = None


@dataclass
class EvaluationConfig:
    """Roll a policy out in LIBERO. Flags left at None follow the checkpoint, the suite, or the protocol."""

    # Policy
    pretrained_checkpoint: str = ""  # checkpoint folder or hub id
    use_l1_regression: bool | None = None  # None: True, unless the folder looks like an original OpenVLA checkpoint
    use_diffusion: bool = False
    num_diffusion_steps_train: int | None = None  # of a diffusion head whose checkpoint does not record it; None: 50
    num_diffusion_steps_inference: int | None = None  # None: as many as in training, at most 50
    use_film: bool = False
    num_images_in_input: int | None = None  # cameras the policy reads
    use_proprio: bool | None = None  # whether the policy reads the robot state
    center_crop: bool | None = None  # central 0.9 of the area, as for policies trained with augmentation
    num_open_loop_steps: int | None = None  # actions executed of each chunk, the first ones; None: the robot's
    unnorm_key: str | None = None  # dataset whose statistics apply; None: the suite's
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    model_family: str = "openvla"  # accepted; goes into the name of the run
    lora_rank: int = 32  # accepted and unneeded: checkpoints are merged
    policy_url: str | None = None  # a policy server instead of a checkpoint: ws://host:port, openpi's protocol
    policy_convention: str | None = None  # openpi or lightvla; None: as the server says, else openpi
    policy_timeout_s: float = 300.0  # how long the server's answer may take

    # Simulator
    task_suite_name: str = "libero_spatial"  # suite; an unknown one lists those there are
    perturbation: str | None = None  # language, object, position, task or environment: LIBERO-PRO's form of the suite
    protocol: str | None = None  # openvla-oft, lightvla or lerobot: the conventions of a published evaluation
    num_steps_wait: int = _BY_PROTOCOL  # steps in which objects come to rest; by default 10, or the protocol's
    num_trials_per_task: int = _BY_PROTOCOL  # the first initial states, in order; by default 50, or the protocol's
    initial_states_path: str = "DEFAULT"  # or a JSON file of states
    env_img_res: int = _BY_PROTOCOL  # side of the rendered pictures in pixels; by default 256, or the protocol's

    # Output
    run_id_note: str | None = None  # ends the name of the output folder
    local_log_dir: str = "./experiments/logs"  # output folders go below it
    save_rollout_video: bool = False  # camera views beside what the pruner kept
    report: bool = True  # report.html and report.md beside the results
    record: bool = False  # observations, actions and kept tokens of every episode, for replays and pictures
    use_wandb: bool = False
    wandb_entity: str | None = None
    wandb_project: str = "lightvla"
    seed: int = _BY_PROTOCOL  # of resets, wide starts and random choices; by default 7, or the protocol's

    # This project's own
    action_head: str = "auto"  # l1, diffusion, discrete, autoregressive; auto: by the flags above and the folder
    pruner: str | None = None  # overrides the checkpoint's: `none`, `lightvla:multiplicity=set`
    action_readout: str | None = None  # aligned or tail
    task_ids: str | None = None  # `1,4,8` or `0-4`; None: all of the suite
    initial_states: str | None = None  # `30-41`; takes the place of num_trials_per_task
    wide_starts_m: float = 0.0  # objects of the goal moved anywhere free within so many metres; 0: standard starts
    renderer: str = "robosuite"  # robosuite or fast
    control: str = "none"  # none, blank_images, swapped_instruction or random_tokens
    device: str = "auto"  # auto, cpu or cuda
    dtype: str | None = None  # bfloat16, float16, float32; None: bfloat16 on a GPU and a CPU that computes in it
    max_videos_per_task: int | None = None  # None: all
    video_every_steps: int = 2  # a frame each so many control steps
    output_dir: str | None = None  # None: a folder of its own below local_log_dir
    num_envs: int | None = None  # simulator processes; 1 simulates beside the policy; None: one per core
    batch_size: int | None = None  # looks answered at once; None: 1, so that no answer depends on who else waits
    resume: bool = False  # go on with the rollouts that output_dir already holds
    max_attempts: int = 3  # how often a rollout is begun before an error makes it invalid
    worker_timeout_s: float = 300.0  # a simulator process that says nothing for so long is replaced
    render_every_step: bool = False  # draw pictures nobody looks at, as the research code does; to compare times

    def __post_init__(self) -> None:
        protocols.fill_in(self)


FREE_FLAGS = frozenset(
    {"output_dir", "local_log_dir", "run_id_note", "use_wandb", "wandb_entity", "wandb_project", "device", "report"}
    | {"num_envs", "resume", "max_attempts", "worker_timeout_s", "render_every_step", "policy_url", "policy_timeout_s"}
    | {"model_family", "lora_rank", "num_diffusion_steps_train", "num_diffusion_steps_inference", "use_l1_regression"}
)
"""Flags that change how an evaluation runs but not what it finds; all others must agree when it is resumed.

The head and the numbers of diffusion steps in force stand in the policy's description, which must agree too."""


def quantization_of(config: EvaluationConfig) -> str | None:
    """`8bit`, `4bit` or None. Raises ValueError where the flags contradict each other or bitsandbytes is missing."""
    if config.load_in_8bit and config.load_in_4bit:
        raise ValueError("--load_in_8bit and --load_in_4bit exclude each other; set one of them to False")
    kind = "8bit" if config.load_in_8bit else "4bit" if config.load_in_4bit else None
    if kind is not None:
        check_quantization(kind)
    return kind


def parse_indices(text: str, name: str) -> list[int]:
    """`1,4,8-10` -> [1, 4, 8, 9, 10]. Raises ValueError for anything else, naming the flag."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--{name} {text!r}: expected numbers and ranges such as 1,4,8 or 30-41")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"--{name} {text!r} names a number twice")
    return found


def check_flags(config: EvaluationConfig) -> None:
    """Raises ValueError for flags that contradict each other, are out of range, or ask for what is not there yet."""
    check_remote_flags(config)
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
    quantization_of(config)
    for flag, known in (("control", CONTROLS), ("renderer", RENDERERS)):
        if getattr(config, flag) not in known:
            raise ValueError(f"unknown --{flag} {getattr(config, flag)!r}; known: {', '.join(known)}")
    suites.find_suite(config.task_suite_name)
    if config.perturbation is not None:
        suites.perturbed(config.task_suite_name, config.perturbation)
    protocols.protocol_of(config)
    if config.dtype not in (None, "auto", *DTYPES):
        raise ValueError(f"unknown --dtype {config.dtype!r}; known: auto, {', '.join(DTYPES)}")
    counts = ("num_trials_per_task", "video_every_steps", "num_open_loop_steps", "num_images_in_input", "num_envs")
    diffusion = ("num_diffusion_steps_train", "num_diffusion_steps_inference")
    for flag in (*counts, *diffusion, "batch_size", "max_attempts"):
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
    if config.save_rollout_video and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError("--save_rollout_video needs imageio-ffmpeg: pip install 'imageio[ffmpeg]'")
    check_wandb(config)
