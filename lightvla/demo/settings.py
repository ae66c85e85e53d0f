"""The demo's settings, where its parts lie, and the commands of its stages."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("collect", "build", "finetune", "evaluate", "report")
DATASET = "libero_goal_demo"
TASKS = "1,4,8"  # put the bowl on the stove, on top of the cabinet, on the plate: one scene, so the instruction matters

PICTURE_FREQ = 150
"""Steps between pictures of what the pruner keeps: one then watches it learn (`pictures/` of the run)."""


@dataclass
class DemoConfig:
    """Collect, build, fine-tune, evaluate, report: a small policy from nothing, as the README's results were made."""

    stage: str = "all"  # all, or one: collect, build, finetune, evaluate or report
    output_dir: Path = Path("demo")  # everything the demo makes lies below it
    num_processes: int = 2  # simulator processes in collection and evaluation
    num_demos_per_task: str = "62"  # from training initial states; evaluation has others
    train_states: str = "0-29"  # initial states to collect from, like 0-29 or 0,4-9
    held_out_states: str = "30-41"  # initial states to evaluate on, like 30-41 or 30,35; none of those trained on
    wide_starts_m: float = 0.06  # evaluation: objects are moved anywhere free within so many metres
    wide_starts_train_m: float = 0.07  # collection goes further, or what lies at the edge is never learnt well
    wide_starts_share: float = 0.7  # of the demonstrations; the others begin at LIBERO's own initial states
    resolution: int = 128  # side of rendered pictures, pixels
    unpruned_steps: int = 2100  # optimiser steps with all visual tokens
    max_steps: int = 1650  # optimiser steps with the pruner, from there
    batch_size: int = 32  # of both trainings
    seed: int = 7  # of initial weights and training
    starts_seed: int = 7  # of collection and evaluation
    suffix: str = ""  # appended to the names of base, run and evaluation, to train another seed on the same data


@dataclass
class SmallModelConfig:
    """Build a small untrained checkpoint: the code path of a 7B policy at a size that trains on two CPU cores."""

    output_dir: Path = Path("runs/small-base")  # where the checkpoint goes
    image_size: int = 112  # image side in pixels, (image_size / 16)^2 tokens per image
    num_images_in_input: int = 2  # cameras the model reads
    vision_dim: int = 128  # width of each ViT
    vision_depth: int = 3  # its blocks; all but the last run
    vision_heads: int = 4  # its attention heads
    fused: bool = False  # two ViTs, as the 7B models have, instead of one
    llm_dim: int = 128  # width of the Llama
    llm_layers: int = 4  # its layers
    llm_heads: int = 4  # its attention heads
    llm_mlp: int = 344  # width inside its MLPs
    pruner: dict[str, Any] = field(  # the recorded one
        default_factory=lambda: {"name": "lightvla", "multiplicity": "weighted"}
    )
    robot: str = "libero"  # the robot that it drives
    canonical_quaternion: bool = False  # how the state's axis-angle was made, recorded with the robot
    seed: int = 7  # of the initial weights


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the trained policy.

    Attributes:
        name: of its folder.
        title: in the report.
        flags: beside those that all evaluations share.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()


def evaluations(config: DemoConfig) -> list[Evaluation]:
    """What the report shows: standard initial states, wide starts, and the controls on wide starts."""
    wide = ("--wide_starts_m", str(config.wide_starts_m))
    video = ("--save_rollout_video", "True", "--max_videos_per_task", "1")
    return [
        Evaluation("standard", "LIBERO's own initial states"),
        Evaluation("wide", "wide starts", (*wide, *video)),
        Evaluation("blank", "wide starts, blank images", (*wide, "--control", "blank_images")),
        Evaluation("swapped", "wide starts, another task's instruction", (*wide, "--control", "swapped_instruction")),
        Evaluation("random", "wide starts, as many random tokens", (*wide, "--control", "random_tokens")),
    ]


@dataclass(frozen=True)
class Paths:
    """Where the demo's parts lie."""

    root: Path
    suffix: str = ""

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def base(self) -> Path:
        return self.root / f"base{self.suffix}"

    @property
    def run(self) -> Path:
        return self.root / "runs" / f"small{self.suffix}"

    @property
    def unpruned_run(self) -> Path:
        return self.root / "runs" / f"small-unpruned{self.suffix}"

    def evaluation(self, name: str) -> Path:
        return self.root / f"evaluation{self.suffix}" / name

    @property
    def report(self) -> Path:
        return self.root / f"report{self.suffix}.html"

    def stage(self, name: str) -> Path:
        """The record of a finished stage."""
        return self.root / "stages" / f"{name}{'' if name == 'collect' else self.suffix}.json"


def stage_commands(config: DemoConfig, stage: str) -> list[list[str]]:
    """The commands of a stage, as a person would type them."""
    paths = Paths(config.output_dir, config.suffix)
    if stage == "collect":
        command = f"""lightvla collect
            --output_dir {quote(paths.data)} --dataset_name {DATASET} --task_suite_name libero_goal --task_ids {TASKS}
            --initial_states {config.train_states} --num_demos_per_task {config.num_demos_per_task}
            --resolution {config.resolution} --renderer fast --num_processes {config.num_processes}
            --recovery_pushes True --recovery_mistakes True --wide_starts_m {config.wide_starts_train_m}
            --wide_starts_share {config.wide_starts_share} --canonical_quaternion True --seed {config.starts_seed}"""
    elif stage == "build":
        command = f"""lightvla build-small-model
            --output_dir {quote(paths.base)} --canonical_quaternion True --seed {config.seed}"""
    elif stage == "finetune":
        return _finetune_commands(config, paths)
    elif stage == "evaluate":
        return [_evaluation_command(config, paths, evaluation) for evaluation in evaluations(config)]
    else:
        return []
    return [shlex.split(command)]


def _finetune_commands(config: DemoConfig, paths: Paths) -> list[list[str]]:
    """First without pruning, then with: a pruner that starts before the policy can act keeps too few tokens."""
    common = f"""torchrun --standalone --nproc-per-node 1 -m lightvla finetune
        --data_root_dir {quote(paths.data)} --dataset_name {DATASET} --run_root_dir {quote(paths.run.parent)}
        --use_lora False --use_l1_regression True --num_images_in_input 2 --use_proprio True --image_aug False
        --state_noise 0.05 --batch_size {config.batch_size} --lr_schedule cosine --lr_warmup_steps 100
        --weight_decay 0.02 --adam_beta2 0.98 --max_grad_norm 1.0 --ema_decay 0.99 --precision auto --num_workers 1
        --num_threads 2 --use_val_set True --val_freq 500 --save_freq 1000 --save_latest_checkpoint_only True
        --seed {config.seed}"""
    unpruned = f"""--vla_path {quote(paths.base)} --run_id_override {paths.unpruned_run.name} --pruner none
        --learning_rate 3e-4 --max_steps {config.unpruned_steps}"""
    pruned = f"""--vla_path {quote(paths.unpruned_run)} --run_id_override {paths.run.name}
        --pruner lightvla:noise=uniform,multiplicity=weighted --noise_end_fraction 0.7
        --learning_rate 3e-4 --max_steps {config.max_steps} --picture_freq {PICTURE_FREQ}"""
    return [shlex.split(f"{common} {own}") for own in (unpruned, pruned)]


def _evaluation_command(config: DemoConfig, paths: Paths, evaluation: Evaluation) -> list[str]:
    command = f"""lightvla eval
        --pretrained_checkpoint {quote(paths.run)} --task_suite_name libero_goal --task_ids {TASKS}
        --initial_states {config.held_out_states} --env_img_res {config.resolution} --renderer fast
        --seed {config.starts_seed} --num_envs 1 --dtype float32 --resume True --report False
        --output_dir {quote(paths.evaluation(evaluation.name))}"""
    return [*shlex.split(command), *evaluation.flags]


def quote(path: Path) -> str:
    """A path as one word of a command."""
    return shlex.quote(str(path))
