"""How a policy that fits two CPU cores is made: the commands of its data and its training, with what they share.

The demo and the studies run them; what is the same for both stands here once.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Collection:
    """Demonstrations by scripted experts.

    Attributes:
        output_dir, dataset: where they go, and what they are called.
        tasks, states, demonstrations: as `lightvla collect` takes them.
        resolution: side of the pictures in pixels.
        wide_m: objects are moved within so many metres,
        wide_share: in this share of the demonstrations.
        seed: of starts, pushes and mistakes.
    """

    output_dir: Path
    dataset: str
    suite: str
    tasks: str
    states: str
    demonstrations: str
    resolution: int
    wide_m: float
    wide_share: float
    seed: int

    def command(self, num_processes: int | str) -> list[str]:
        """As a person would type it."""
        return shlex.split(f"""lightvla collect
            --output_dir {quote(self.output_dir)} --dataset_name {self.dataset} --task_suite_name {self.suite}
            --task_ids {self.tasks} --initial_states {self.states} --num_demos_per_task {self.demonstrations}
            --resolution {self.resolution} --renderer fast --num_processes {num_processes}
            --recovery_pushes True --recovery_mistakes True --wide_starts_m {self.wide_m}
            --wide_starts_share {self.wide_share} --canonical_quaternion True --seed {self.seed}""")


def build_command(output_dir: Path, seed: int) -> list[str]:
    """Make the untrained policy."""
    return shlex.split(f"""lightvla build-small-model
            --output_dir {quote(output_dir)} --canonical_quaternion True --seed {seed}""")


@dataclass(frozen=True)
class SmallTraining:
    """What all trainings on one set of data share.

    Attributes:
        data, dataset: as of the collection.
        runs: folder of the runs.
        seed: of the order of the data and of noise.
        save_freq: steps between checkpoints, which all stay; None: the newest one alone.
    """

    data: Path
    dataset: str
    runs: Path
    batch_size: int
    seed: int
    save_freq: int | None = None

    def command(self, base: Path, name: str, flags: str, rate: str, steps: int) -> list[str]:
        """Train the policy in `base` for so many steps; `flags` say with which pruner."""
        return shlex.split(f"""torchrun --standalone --nproc-per-node 1 -m lightvla finetune
        --data_root_dir {quote(self.data)} --dataset_name {self.dataset} --run_root_dir {quote(self.runs)}
        --use_lora False --use_l1_regression True --num_images_in_input 2 --use_proprio True --image_aug False
        --state_noise 0.05 --batch_size {self.batch_size} --lr_schedule cosine --lr_warmup_steps 100
        --weight_decay 0.02 --adam_beta2 0.98 --max_grad_norm 1.0 --ema_decay 0.99 --precision auto --num_workers 1
        --num_threads 2 --use_val_set True --val_freq 500 --save_freq {self.save_freq or 1000}
        --save_latest_checkpoint_only {self.save_freq is None}
        --seed {self.seed} --vla_path {quote(base)} --run_id_override {name}
        {flags}
        --learning_rate {rate} --max_steps {steps}""")


def quote(path: Path) -> str:
    """A path as one word of a command."""
    return shlex.quote(str(path))
