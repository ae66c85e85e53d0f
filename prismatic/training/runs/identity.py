"""What makes a run itself: its name, and which flags may be others when it goes on.

Everything that decides what is learnt is the run's own: with another value it would be another run. What is in neither
table below may not change.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prismatic.checkpoints.places import BEST, CHECKPOINTS, LATEST

FREE: Mapping[str, str] = {
    "vla_path": "the base model may lie elsewhere; its weights must be the same tensor by tensor",
    "data_root_dir": "the data may lie elsewhere; they must be the same",
    "run_root_dir": "the run folder may have been moved",
    "shuffle_buffer_size": "has no effect",
    "batch_size": "processes x batch size x accumulation must stay what it was",
    "grad_accumulation_steps": "as the batch size",
    "val_freq": "from here on",
    "val_time_limit": "from here on",
    "save_freq": "from here on",
    "save_minutes": "from here on",
    "save_in_background": "from here on",
    "save_latest_checkpoint_only": "from here on",
    "keep_last": "at the next checkpoint",
    "keep_best": "at the next checkpoint",
    "resume": "says how to go on",
    "resume_step": "says where to go on",
    "diffusion_sample_freq": "from here on",
    "merge_lora_during_training": "from here on",
    "log_freq": "from here on",
    "tensorboard_log_dir": "from here on",
    "tensorboard_log_freq": "from here on",
    "use_wandb": "from here on",
    "tracker": "from here on",
    "wandb_entity": "from here on",
    "wandb_project": "from here on",
    "wandb_log_freq": "from here on",
    "report_minutes": "from here on",
    "picture_freq": "from here on",
    "picture_frames": "from here on",
    "run_id_note": "is part of the name alone",
    "run_id_override": "is the name",
    "device": "from here on; another kind of processor rounds differently",
    "gradient_checkpointing": "from here on; computes the same",
    "sharding": "from here on; sums are rounded in another order",
    "on_nan": "from here on",
    "max_bad_samples": "from here on; they are counted anew",
    "dry_run": "nothing goes on",
    "num_workers": "from here on",
    "num_threads": "from here on; another number rounds differently",
    "save_timeout_minutes": "from here on",
}
"""Flags that may change whenever a run goes on -> what then happens. They are no part of a run's name."""

ANNOUNCED: Mapping[str, str] = {
    "max_steps": "the run ends earlier or later; noise and cosine keep the length that the run began with",
    "learning_rate": "from here on",
    "lr_warmup_steps": "from here on",
    "num_steps_before_decay": "from here on",
    "lr_schedule": "from here on",
    "weight_decay": "from here on",
    "adam_beta1": "from here on",
    "adam_beta2": "from here on",
    "max_grad_norm": "from here on",
}
"""Flags that change what is learnt, and may change where `--resume True` or a step asks for it -> what then happens.

Each change is a line in the log and in `run.json`. `--resume auto` refuses them: a command that is merely started again
must not train something else.
"""

_READABLE = (
    "dataset_name", "learning_rate", "use_lora", "lora_rank", "lora_dropout", "use_l1_regression", "use_diffusion",
    "use_film", "num_images_in_input", "use_proprio", "pruner", "seed", "image_aug",
)  # fmt: skip
"""Flags that a run's name tells in words."""
LONGEST_NAME = 200
"""Bytes of a run's name: file systems take 255, and checkpoints add their step."""
_LONGEST_BASE = 64
"""Characters of the base model's name that a run's name takes; file systems end at 255 for the whole."""


def plain_flags(config: Any) -> dict[str, Any]:
    """Flags as JSON and a training state hold them: paths as text, of `--dataset_spec` what the file says.

    Raises ValueError where that file cannot be read.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    if (file := config.spec_file) is not None:  # wherever it lies, with whatever comments
        values["dataset_spec"] = dict(file.content)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def run_id(config: Any, world_size: int) -> str:
    """A run's name: base model, data, samples per step, and whatever else distinguishes it from other runs.

    The batch counts all processes and accumulation, so a run that goes on with other numbers of them keeps its name.
    Flags that are told in no words and differ from their defaults are a digest, `x` and six hexadecimal digits.
    """
    samples = config.batch_size * config.grad_accumulation_steps * world_size
    parts = [f"{_base_name(config.vla_path)}+{config.dataset_name}+b{samples}+lr-{config.learning_rate}"]
    if config.use_lora:
        parts.append(f"lora-r{config.lora_rank}+dropout-{config.lora_dropout}")
    if not config.use_l1_regression:
        parts.append("diffusion" if config.use_diffusion else "discrete")
    parts += ["film"] if config.use_film else []
    parts += [f"{config.num_images_in_input}img"] if config.num_images_in_input != 1 else []
    parts += ["proprio"] if config.use_proprio else []
    parts += [re.sub(r"[^\w.]+", "-", config.pruner)] if config.pruner is not None else []
    parts += [f"seed{config.seed}"] if config.seed != _default(config, "seed") else []
    parts += _digest(config)
    notes = ("image_aug" if config.image_aug else None, config.run_id_note)
    name = "+".join(parts) + "".join(f"--{note}" for note in notes if note)
    return name if len(name.encode()) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2]}~{_short_digest(name)}"


def check_name(name: str) -> None:
    """Raises ValueError for a run's name that is no name of one folder, or too long for what is made of it."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(
            f"the run's name {name!r} is no name of one folder; choose another --run_id_override or --run_id_note "
            "(no /, not . or ..)"
        )
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"the run's name has {len(name.encode())} bytes and may have {LONGEST_NAME} (file systems take 255, "
            f"and steps are added): {name!r}; choose a shorter --run_id_override or --run_id_note"
        )


def _base_name(vla_path: str) -> str:
    path = Path(vla_path)
    if path.name in (LATEST, BEST) and path.parent.name == CHECKPOINTS:
        path = path.parents[1]  # a run's pointers
    name = path.name
    if len(name) <= _LONGEST_BASE:
        return name
    return f"{name[: _LONGEST_BASE - 8]}~{_short_digest(name)}"


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _default(config: Any, name: str) -> Any:
    return next(field.default for field in fields(config) if field.name == name)


def _digest(config: Any) -> list[str]:
    untold = {
        name: value
        for name, value in plain_flags(config).items()
        if name not in (*_READABLE, *FREE, "max_steps") and value != _default(config, name)
    }
    text = "".join(f"{name}={value}\n" for name, value in sorted(untold.items()))
    return ["x" + _short_digest(text)] if text else []


@dataclass(frozen=True)
class Change:
    """A flag that has another value than in the run that goes on."""

    flag: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"--{self.flag} {self.now} (the run had {self.was})"


def changes(config: Any, recorded: Mapping[str, Any]) -> list[Change]:
    """Flags, but for the `FREE` ones, that differ from a run's recorded ones; what was not recorded does not."""
    now = plain_flags(config)
    ignored = {*FREE} | ({"lora_rank", "lora_dropout"} if not config.use_lora else set())
    return [
        Change(name, recorded[name], value)
        for name, value in now.items()
        if name in recorded and name not in ignored and recorded[name] != value
    ]


def check_changes(config: Any, recorded: Mapping[str, Any], folder: Path, announced: bool) -> list[Change]:
    """The changes to announce. Raises ValueError for the first that a run cannot go on with.

    Args:
        config: flags of the command.
        recorded: those of the run.
        folder: of the run, for messages.
        announced: whether the `ANNOUNCED` flags may change.
    """
    found = changes(config, recorded)
    for change in found:
        if change.flag not in ANNOUNCED:
            raise ValueError(
                f"--{change.flag} {change.now}: the run in {folder} had {change.was}; pass that to go on, or another "
                "--run_id_note or --run_id_override to begin a new run"
            )
        if not announced:
            raise ValueError(
                f"--{change.flag} {change.now}: the run in {folder} had {change.was}. Pass that to go on as it was, "
                "--resume True to go on with the new value, or another --run_id_note or --run_id_override to begin a "
                "new run"
            )
    return found
