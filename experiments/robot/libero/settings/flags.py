"""The flags of `lightvla eval`, and the values of those that were left out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from experiments.robot.libero.settings.protocols import DEFAULT, GOVERNED, PROTOCOLS, Protocol
from experiments.robot.libero.settings.suite_names import PERTURBATIONS, perturbed, suites_of
from prismatic.vla.robots import RobotSpec

OWN_STATES = "DEFAULT"
"""What `--initial_states_path` says for the initial states that come with LIBERO's tasks."""

# A flag that was left out; `__post_init__` puts a number in its place.
_BY_PROTOCOL: Any = None


class LeftOut(int):
    """The number of a flag that nobody gave: a protocol's or a default. Remains one through copies and `replace`."""


@dataclass
class EvaluationConfig:
    """Roll a policy out in LIBERO. Flags left at None follow the checkpoint, the suite, or the protocol."""

    # Policy
    pretrained_checkpoint: str = ""  # checkpoint folder or hub id
    use_l1_regression: bool | None = None  # None: True, unless the folder looks like an original OpenVLA checkpoint
    use_diffusion: bool = False  # the checkpoint has a diffusion head
    num_diffusion_steps_train: int | None = None  # of a diffusion head whose checkpoint does not record it; None: 50
    num_diffusion_steps_inference: int | None = None  # None: as many as in training, at most 50
    use_film: bool = False  # it was trained with FiLM
    num_images_in_input: int | None = None  # cameras the policy reads; None: as the checkpoint says, else 2
    use_proprio: bool | None = (
        None  # whether the policy reads the robot state; None: where its projector's file is there
    )
    center_crop: bool | None = None  # central 0.9 of the area; None: where the policy was trained with augmentation
    num_open_loop_steps: int | None = None  # actions executed of each chunk, the first ones; None: the robot's
    unnorm_key: str | None = None  # dataset whose statistics apply; None: the suite's
    load_in_8bit: bool = False  # quantize the language model, on a GPU with bitsandbytes
    load_in_4bit: bool = False  # the same, smaller
    model_family: str = "openvla"  # accepted; goes into the name of the run
    lora_rank: int = 32  # accepted and unneeded: checkpoints are merged
    policy_url: str | None = None  # a policy server instead of a checkpoint: ws://host:port, openpi's protocol
    policy_convention: str | None = None  # openpi or lightvla; None: as the server says, else openpi
    policy_timeout_s: float = 300.0  # how long the server's reply, or a query of the policy in this process, may take
    max_policy_failures: int = 5  # so many queries in a row that the policy failed at end the evaluation

    # Simulator
    task_suite_name: str = "libero_spatial"  # suites, with commas; libero_4: spatial, object, goal, 10; all: with 90
    perturbation: str | None = None  # language, object, position, task or environment: LIBERO-PRO's form of the suite
    protocol: str | None = None  # openvla-oft, lightvla or lerobot: the conventions of a published evaluation
    num_steps_wait: int = _BY_PROTOCOL  # steps in which objects come to rest; by default 10, or the protocol's
    num_trials_per_task: int = _BY_PROTOCOL  # initial states, in order; by default the first 50, or the protocol's
    initial_states_path: str = OWN_STATES  # or a JSON file of states
    env_img_res: int = _BY_PROTOCOL  # side of the rendered pictures in pixels; by default 256, or the protocol's

    # Output
    run_id_note: str | None = None  # ends the name of the output folder
    local_log_dir: str = "./experiments/logs"  # output folders go below it
    save_rollout_video: str | bool = False  # True, False or failures: camera views beside what the pruner kept
    report: bool = True  # report.html and report.md beside the results
    record: bool = False  # observations, actions and kept tokens of every episode, for replays and pictures
    use_wandb: bool = False  # log to Weights & Biases
    wandb_entity: str | None = None  # None: the login's own
    wandb_project: str = "lightvla"  # project there
    seed: int = _BY_PROTOCOL  # of resets and random choices; another is no new trial; by default 7, or the protocol's

    # This project's own
    action_head: str = "auto"  # l1, diffusion, discrete, autoregressive; auto: by the flags above and the folder
    pruner: str | None = None  # overrides the checkpoint's: `none`, `lightvla:multiplicity=set`
    action_readout: str | None = None  # aligned or tail
    task_ids: str | None = None  # `1,4,8` or `0-4`; None: all of the suite
    initial_states: str | None = None  # `30-41`: each once, or gone round for as many trials as are asked for
    wide_starts_m: float = 0.0  # objects of the goal moved anywhere free within so many metres; 0: standard starts
    renderer: str = "robosuite"  # robosuite or fast
    control: str = "none"  # none, blank_images, swapped_instruction, random_tokens, added_tokens, dropped_tokens
    device: str = "auto"  # auto, cpu or cuda
    dtype: str | None = None  # bfloat16, float16, float32; None: bfloat16 on GPUs and CPUs that are faster in it
    load_in_fp8: bool = False  # the language model in fp8 by torchao: faster, on GPUs of compute capability 8.9 and up
    engine: str = "auto"  # eager, compiled; auto: compiled where the policy allows it
    max_videos_per_task: int | None = None  # None: all
    video_every_steps: int = 2  # a frame each so many control steps
    output_dir: str | None = None  # None: a folder of its own below local_log_dir
    num_envs: int | None = None  # simulator processes; 1: beside the policy; None: as many as cores and memory allow
    batch_size: int | None = None  # policy queries at once; None: 1, so that no action depends on who else waits
    resume: bool = False  # go on with what output_dir holds already, also with more initial states or tasks
    force: bool = False  # with --resume: also where policy, flags or simulator were others; the results say it
    shard: str | None = None  # 2/4: rollouts 2, 6, 10, ... only; `lightvla merge-results` puts the four together
    max_attempts: int = 3  # how often a rollout is begun before an error makes it invalid
    worker_timeout_s: float = 300.0  # a simulator process that says nothing for so long is replaced
    render_every_step: bool = False  # draw pictures nobody looks at, as the research code does; to compare times

    def open_loop_steps(self, robot: RobotSpec) -> int:
        """Actions executed of each chunk: as the flag says, else as the policy's robot does."""
        return self.num_open_loop_steps or robot.open_loop_steps

    @property
    def trials_of_states(self) -> int | None:
        """How many trials `initial_states` are gone round for; None: each once, or there are none by name."""
        given = self.initial_states is not None and not isinstance(self.num_trials_per_task, LeftOut)
        return self.num_trials_per_task if given else None

    def __post_init__(self) -> None:
        self.save_rollout_video = truth(self.save_rollout_video)
        fill_in(self)


MAX_EMBEDDED_MB = 6.0
"""Megabytes of clips and pictures in a report, unless `lightvla report` is told otherwise."""

FREE_FLAGS = frozenset(
    {"force", "max_policy_failures"}
    | {"output_dir", "local_log_dir", "run_id_note", "use_wandb", "wandb_entity", "wandb_project", "device", "report"}
    | {"num_envs", "resume", "max_attempts", "worker_timeout_s", "render_every_step", "policy_url", "policy_timeout_s"}
    | {"model_family", "lora_rank", "num_diffusion_steps_train", "num_diffusion_steps_inference", "use_l1_regression"}
)
"""Flags that change how an evaluation runs but not what it finds; all others must agree when it is resumed, but for
those in `GROWING`.

The head and the numbers of diffusion steps in force stand in the policy's description, which must agree too."""


GROWING = frozenset({"initial_states", "num_trials_per_task", "task_ids"})
"""Flags that say what is rolled out: a resumed evaluation may ask for more, never for less."""


def truth(value: str | bool) -> str | bool:
    """A switch with more than two positions: `True` and `false` as text -> bool; other words stay."""
    return {"true": True, "false": False}.get(str(value).lower(), value)


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


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` -> (2, 4). Raises ValueError for anything but a part, from 1, and how many parts there are."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"--shard {text!r}: expected a part and how many there are, from 1/4 to 4/4, say")
    return part, parts


def protocol_of(config: EvaluationConfig) -> Protocol:
    """Raises ValueError for an unknown `--protocol`."""
    if config.protocol is None:
        return DEFAULT
    if config.protocol not in PROTOCOLS:
        raise ValueError(f"unknown --protocol {config.protocol!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[config.protocol]


def fill_in(config: EvaluationConfig) -> None:
    """Give the flags that were left out their values, and the suites their names and perturbation.

    What is unknown stays for `check_flags` to complain about.
    """
    protocol = PROTOCOLS.get(config.protocol or "", DEFAULT)
    for flag in GOVERNED:
        if getattr(config, flag) is None:
            value = getattr(protocol, flag)
            setattr(config, flag, LeftOut(value) if flag == "num_trials_per_task" else value)
    try:
        suites = suites_of(config.task_suite_name)
        if config.perturbation in PERTURBATIONS:
            suites = [perturbed(suite, config.perturbation) for suite in suites]
    except ValueError:
        return
    config.task_suite_name = ",".join(suites)
