"""The demo's settings, where its parts lie, and the commands of its stages."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightvla.small_scale import Collection, SmallTraining, build_command, quote

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
    num_demos_per_task: str = "45"  # from training initial states; evaluation has others
    train_states: str = "0-29"  # initial states to collect from, like 0-29 or 0,4-9
    held_out_states: str = "30-41"  # initial states to evaluate on, like 30-41 or 30,35; none of those trained on
    wide_starts_m: float = 0.05  # evaluation: objects are moved anywhere free within so many metres
    wide_starts_train_m: float = 0.07  # collection goes further, or what lies at the edge is never learnt well
    wide_starts_share: float = 0.7  # of the demonstrations; the others begin at LIBERO's own initial states
    resolution: int = 128  # side of rendered pictures, pixels
    unpruned_steps: int = 1800  # optimiser steps with all visual tokens
    max_steps: int = 900  # optimiser steps with the pruner, from there
    baseline: bool = True  # also train as many steps from there without it, and compare on the same starts
    batch_size: int = 32  # of all trainings
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
    """One evaluation of a trained policy.

    Attributes:
        name: of its folder.
        title: in the report.
        flags: beside those that all evaluations share.
        pruned: whether of the pruned policy, or of the one that was trained as long without pruning.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()
    pruned: bool = True


def evaluations(config: DemoConfig) -> list[Evaluation]:
    """What the report shows: standard initial states, wide starts, the unpruned policy and the controls on those."""
    wide = ("--wide_starts_m", str(config.wide_starts_m))
    video = ("--save_rollout_video", "True", "--max_videos_per_task", "1")
    return [
        Evaluation("standard", "LIBERO's own initial states"),
        Evaluation("wide", "wide starts", (*wide, *video)),
        *(
            [Evaluation("baseline", "wide starts, trained alike without pruning", wide, pruned=False)]
            if config.baseline
            else []
        ),
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
        """Where the other two go on from."""
        return self.root / "runs" / f"small-unpruned{self.suffix}"

    @property
    def baseline_run(self) -> Path:
        """Trained on without pruning: with as many steps as `run`, on the same data in the same order."""
        return self.root / "runs" / f"small-baseline{self.suffix}"

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
        collection = Collection(
            paths.data, DATASET, "libero_goal", TASKS, config.train_states, config.num_demos_per_task,
            config.resolution, config.wide_starts_train_m, config.wide_starts_share, config.starts_seed,
        )  # fmt: skip
        return [collection.command(config.num_processes)]
    if stage == "build":
        return [build_command(paths.base, config.seed)]
    if stage == "finetune":
        return _finetune_commands(config, paths)
    if stage == "evaluate":
        return [_evaluation_command(config, paths, evaluation) for evaluation in evaluations(config)]
    return []


def _finetune_commands(config: DemoConfig, paths: Paths) -> list[list[str]]:
    """First without pruning, then with: a pruner that starts before the policy can act keeps too few tokens.

    With `baseline` once more without, from the same policy: what pruning costs is told by policies trained alike.
    """
    training = SmallTraining(paths.data, DATASET, paths.run.parent, config.batch_size, config.seed)
    pruner = "--pruner lightvla:noise=uniform,multiplicity=weighted --noise_end_fraction 0.7"
    pruner += f" --picture_freq {PICTURE_FREQ}"
    baseline = training.command(paths.unpruned_run, paths.baseline_run.name, "--pruner none", "3e-4", config.max_steps)
    return [
        training.command(paths.base, paths.unpruned_run.name, "--pruner none", "3e-4", config.unpruned_steps),
        training.command(paths.unpruned_run, paths.run.name, pruner, "3e-4", config.max_steps),
        *([baseline] if config.baseline else []),
    ]


def _evaluation_command(config: DemoConfig, paths: Paths, evaluation: Evaluation) -> list[str]:
    run = paths.run if evaluation.pruned else paths.baseline_run
    command = f"""lightvla eval
        --pretrained_checkpoint {quote(run)} --task_suite_name libero_goal --task_ids {TASKS}
        --initial_states {config.held_out_states} --env_img_res {config.resolution} --renderer fast
        --seed {config.starts_seed} --num_envs 1 --dtype float32 --engine eager --resume True --report False
        --output_dir {quote(paths.evaluation(evaluation.name))}"""
    return [*shlex.split(command), *evaluation.flags]
