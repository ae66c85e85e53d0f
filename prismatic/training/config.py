"""The flags of `lightvla finetune`. Published names keep working; what this project adds stands last."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from prismatic.checkpoints.places import CHECKPOINTS, checkpoint_name
from prismatic.command_line import find_home
from prismatic.training.runs.identity import run_id
from prismatic.vla.datasets.entries.spec_file import SpecFile, read_spec_file

RECOMPUTED = {"False": (False, False), "vits": (True, False), "llm": (False, True), "True": (True, True)}
"""By `--gradient_checkpointing`: whether the ViTs' activations are computed twice, and the language model's."""

SHARDINGS = ("none", "fsdp")
"""What `--sharding` may be."""


@dataclass
class FinetuneConfig:
    """Fine-tune a checkpoint on an RLDS or LeRobot dataset. A step is an optimiser step, also with accumulation."""

    # Model and data
    vla_path: str = "openvla/openvla-7b"  # checkpoint folder or hub id
    data_root_dir: Path = Path("datasets/rlds")  # folder that holds the dataset's folder
    dataset_name: str = "libero_spatial_no_noops"  # its name, or a mixture by frames: name+name:weight
    robot: str | None = None  # libero, aloha or bridge; None: the one of the dataset's entry
    gripper: str | None = None  # libero, open1, closed1 or width:CLOSED,OPEN; None: the dataset's name or entry says
    dataset_spec: Path | None = None  # YAML file that says how the dataset is read; None: name, entry or --robot do
    run_root_dir: Path = Path("runs")  # run folders go below it; a run's checkpoints are in its `checkpoints/`
    shuffle_buffer_size: int = 100_000  # accepted and unneeded: the order is a global shuffle

    # What the policy is
    use_l1_regression: bool = True  # predict actions by the L1 head
    use_diffusion: bool = False  # predict them by DDIM diffusion; with --use_l1_regression False
    num_diffusion_steps_train: int | None = None  # None: as the checkpoint records, 50 for a new head
    use_film: bool = False  # the instruction modulates the ViTs
    num_images_in_input: int = 1  # cameras the policy reads, the robot's first ones
    use_proprio: bool = False  # whether it reads the robot state

    # Optimisation
    batch_size: int = 8  # per process and micro-step
    learning_rate: float = 5e-4  # after warm-up, before decay
    lr_warmup_steps: int = 0  # steps in which the rate rises from a tenth of it
    num_steps_before_decay: int = 100_000  # for --lr_schedule step: then the rate falls to a tenth
    grad_accumulation_steps: int = 1  # micro-steps of a step
    max_steps: int = 200_000  # steps of the whole run, those before a resume included
    use_val_set: bool = False  # measure the loss on held-out episodes
    val_freq: int = 10_000  # steps between validations
    val_time_limit: int = 180  # seconds per validation
    save_freq: int = 10_000  # steps between checkpoints
    save_latest_checkpoint_only: bool = False  # as --keep_last 1, with `latest` in the names of component files
    resume: str = "auto"  # auto: the run's newest checkpoint if there is one; True: it must be there; False; or a step
    resume_step: int | None = None  # as --resume STEP
    image_aug: bool = True  # random crops and colours; inference then crops the centre
    diffusion_sample_freq: int = 50  # every so many steps actions are sampled from a batch and their L1 is told

    # LoRA
    use_lora: bool = True  # train adapters; False: all weights
    lora_rank: int = 32  # of the adapters
    lora_dropout: float = 0.0  # above 0 rules out compact training
    merge_lora_during_training: bool = (
        True  # checkpoints hold merged weights; False: the adapter alone, smaller and quicker
    )

    # Logging
    log_freq: int = 10  # steps between lines of metrics.jsonl
    tensorboard_log_dir: Path | None = None  # None: `tensorboard` in the run folder
    tensorboard_log_freq: int = 10  # steps between entries there
    tracker: str | None = None  # log to wandb or trackio, too; none; None: wandb where --use_wandb True says so
    use_wandb: bool = False  # the published name of --tracker wandb
    wandb_entity: str | None = None  # None: the login's own; wandb alone
    wandb_project: str = "lightvla"  # project of the tracker
    wandb_log_freq: int = 10  # steps between entries there
    report_minutes: float = 2.0  # between writings of the run's report.html, and one at its end; 0: none
    picture_freq: int = 1000  # steps between pictures of the tokens kept; 0, or more than the run has: none
    picture_frames: int = 4  # frames that they show, always the same
    run_id_note: str | None = None  # ends the run's name; None: nothing
    run_id_override: str | None = None  # the run's name; None: made of what distinguishes it

    # This project's own
    pruner: str | None = None  # lightvla:noise=gumbel, lightvla_star:site=llama,layer=2, none; None: the checkpoint's
    compact_training: bool = True  # one row per distinct pick; False: one per query, as the reference (slower, equal)
    noise_schedule: str = "linear"  # of the pruner's noise: linear (down to 0) or constant
    noise_end_fraction: float = 1.0  # linear noise reaches 0 at this fraction of max_steps
    lr_schedule: str = "step"  # step or cosine
    state_noise: float = 0.0  # deviation of Gaussian noise on the normalised robot state; 0: off
    weight_decay: float = 0.01  # on matrices only
    adam_beta1: float = 0.9  # decay of the mean of gradients
    adam_beta2: float = 0.999  # decay of the mean of their squares
    max_grad_norm: float = 0.0  # clip the gradient's norm; 0: off
    ema_decay: float = 0.0  # average of the weights, validated and saved; 0: off
    val_fraction: float = 0.05  # of train's episodes, held out where the dataset has no split `val` or `validation`
    seed: int = 7  # of data order, augmentation, noise and new weights
    device: str = "auto"  # auto, cpu or cuda
    gradient_checkpointing: str = "False"  # compute activations twice, not store them: vits, llm, True (both) or False
    sharding: str = "none"  # fsdp: each process holds its share of weights, gradients and averages; none: all (DDP)
    precision: str = "auto"  # bf16 (autocast) or fp32; auto: bf16 on GPUs that can, on CPUs where it is clearly faster
    keep_last: int = 0  # so many checkpoints stay, beside the one being written; 0: all
    keep_best: bool = False  # the one with the lowest validation loss stays, too; each save is validated; `best` is it
    save_minutes: float = 0.0  # save also whenever so many minutes have passed since the last time; 0: off
    save_in_background: str = "auto"  # True: write from a copy while training goes on; auto: if memory suffices; False
    on_nan: str = "stop"  # what a loss or gradient that is not finite brings: stop, skip or rollback
    max_bad_samples: int = 10  # pictures that cannot be decoded, for which other frames stand; more end the run
    num_workers: int = 2  # processes per rank that read and augment; 0: none
    num_threads: int = 0  # computing threads per process; 0: torch's choice
    dry_run: bool = False  # check everything, tell the plan and stop: nothing is trained or written
    save_timeout_minutes: int = 360  # how long the other processes wait while one writes a checkpoint

    def __post_init__(self) -> None:
        self.resume, self.gradient_checkpointing = str(self.resume), str(self.gradient_checkpointing)
        find_home(self)

    @cached_property
    def spec_file(self) -> SpecFile | None:
        """What `--dataset_spec` says. It is read once: what is edited while a run goes on does not change the run.

        Raises ValueError where it cannot be read.
        """
        return read_spec_file(self.dataset_spec)

    @property
    def run_id(self) -> str:
        """Name of the run: the override, else what distinguishes it; as the published code, of the checkpoint that
        `--resume True` is given as `vla_path`."""
        if self.run_id_override is not None:
            return self.run_id_override
        own = run_id(self, int(os.environ.get("WORLD_SIZE", "1")))
        base = Path(self.vla_path).name
        if self.resume not in ("auto", "False") and base.endswith("_chkpt") and "--" in base:
            # A second stage that begins with the checkpoint has a run folder of its own.
            return own if (self.run_root_dir / own).is_dir() else base.rpartition("--")[0]
        return own

    @property
    def tracking(self) -> str:
        """What the run is told to besides its own folder: `wandb`, `trackio` or `none`."""
        return self.tracker or ("wandb" if self.use_wandb else "none")

    @property
    def step_to_resume(self) -> int | None:
        """The step that `--resume` or `--resume_step` names. Raises ValueError for what is none of the choices."""
        if self.resume in ("auto", "True", "False"):
            return self.resume_step
        if not self.resume.isdecimal():
            raise ValueError(f"--resume {self.resume!r} is unknown; choose auto, True, False or a step")
        return int(self.resume)

    def samples_per_step(self, world_size: int) -> int:
        """Samples that one optimiser step sees, all processes together."""
        return self.batch_size * self.grad_accumulation_steps * world_size

    @property
    def run_dir(self) -> Path:
        """Folder of the run: logs, and checkpoints in `checkpoints/`."""
        return self.run_root_dir / self.run_id

    def checkpoint_dir(self, step: int) -> Path:
        """Where the checkpoint of finished step `step` goes."""
        return self.run_dir / CHECKPOINTS / checkpoint_name(self.run_id, step)
