"""Bad input is found before anything heavy is loaded."""

import importlib.util
import logging
import math
import os
import tempfile

from prismatic.checkpoints.components import diffusion_steps, head_kind
from prismatic.checkpoints.directory import check_loadable
from prismatic.checkpoints.files import read_config, resolve
from prismatic.extern.hf.building import check_pruner
from prismatic.models.pruners.registry import resolve_pruner
from prismatic.stored_files import read_json
from prismatic.training.config import RECOMPUTED, SHARDINGS, FinetuneConfig
from prismatic.training.data import dataset_specs
from prismatic.training.distributed import resolve_device
from prismatic.training.health import ON_NAN
from prismatic.training.pruning import check_form
from prismatic.training.runs.identity import check_name
from prismatic.training.runs.resuming import find_resumption
from prismatic.training.schedules import NOISE_SCHEDULES, SCHEDULES
from prismatic.training.telling.trackers import check_tracker
from prismatic.training.wandb_account import without_effect
from prismatic.vla.datasets.entries.opening import check_folder

log = logging.getLogger(__name__)

_FREQUENCIES = ("val_freq", "save_freq", "log_freq", "tensorboard_log_freq", "wandb_log_freq")
_COUNTS = ("batch_size", "grad_accumulation_steps", "max_steps", "lora_rank", "num_images_in_input")
_POSITIVE = (
    *_COUNTS,
    "num_diffusion_steps_train",
    "diffusion_sample_freq",
    "save_timeout_minutes",
    "picture_frames",
    *_FREQUENCIES,
)
_NOT_NEGATIVE = (
    "state_noise",
    "keep_last",
    "save_minutes",
    "report_minutes",
    "max_bad_samples",
    "lr_warmup_steps",
    "num_workers",
    "num_threads",
    "picture_freq",
    "seed",
    "weight_decay",
    "max_grad_norm",
)
_MOST_PICTURE_FRAMES = 50
"""More make a picture that is higher than WebP can hold."""
_SHARES = ("ema_decay", "lora_dropout", "adam_beta1", "adam_beta2")


def check_flags(config: FinetuneConfig) -> None:
    """Raises ValueError naming the flag, its value and the remedy. Needs no file (`--tracker wandb`: a login)."""
    _check_method(config)
    _check_ranges(config)
    resolve_pruner(config.pruner, None, "training")
    _ = config.step_to_resume
    check_name(config.run_id)
    if config.resume_step is not None and config.resume == "False":
        raise ValueError(f"--resume_step {config.resume_step} with --resume False; leave one of them out")
    if config.save_in_background not in ("auto", "True", "False"):
        raise ValueError(f"--save_in_background {config.save_in_background!r} is unknown; choose auto, True or False")
    if config.keep_best and not config.use_val_set:
        raise ValueError("--keep_best True needs a validation loss; pass --use_val_set True")
    if config.shuffle_buffer_size != FinetuneConfig.shuffle_buffer_size:
        log.info("--shuffle_buffer_size is not needed: all frames are shuffled globally")
    check_tracker(config)
    for line in without_effect(config):
        log.warning("%s", line)


def _check_method(config: FinetuneConfig) -> None:
    if config.use_l1_regression and config.use_diffusion:
        raise ValueError("--use_l1_regression and --use_diffusion exclude each other; set one of them to False")
    if config.num_diffusion_steps_train is not None and not config.use_diffusion:
        log.warning("--num_diffusion_steps_train is of diffusion heads, and --use_diffusion is False: it is not used")
    if config.state_noise and not config.use_proprio:
        raise ValueError(f"--state_noise {config.state_noise} does nothing without --use_proprio True; leave it out")
    if config.use_diffusion and importlib.util.find_spec("diffusers") is None:
        raise ValueError("--use_diffusion True needs diffusers: pip install 'lightvla[diffusion]'")
    if config.use_film and config.use_lora and not config.merge_lora_during_training:
        raise ValueError(
            "--use_film True with --merge_lora_during_training False: the FiLM component holds whole weights; leave "
            "merging on"
        )
    if config.lr_schedule not in SCHEDULES:
        raise ValueError(f"--lr_schedule {config.lr_schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if config.noise_schedule not in NOISE_SCHEDULES:
        known = ", ".join(NOISE_SCHEDULES)
        raise ValueError(f"--noise_schedule {config.noise_schedule!r} is unknown; choose one of {known}")
    if config.on_nan not in ON_NAN:
        raise ValueError(f"--on_nan {config.on_nan!r} is unknown; choose one of {', '.join(ON_NAN)}")
    if config.gradient_checkpointing not in RECOMPUTED:
        known = ", ".join(RECOMPUTED)
        raise ValueError(
            f"--gradient_checkpointing {config.gradient_checkpointing!r} is unknown; choose one of {known}"
        )
    _check_sharding(config.sharding, int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1)
    if config.precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"--precision {config.precision!r} is unknown; choose auto, bf16 or fp32")


def _check_sharding(sharding: str, world_size: int) -> None:
    if sharding not in SHARDINGS:
        raise ValueError(f"--sharding {sharding!r} is unknown; choose one of {', '.join(SHARDINGS)}")
    if sharding != "none" and world_size == 1:
        raise ValueError(
            f"--sharding {sharding} divides the weights among processes, and here is one: start several by torchrun "
            "--nproc-per-node, or leave the flag out"
        )


def _check_ranges(config: FinetuneConfig) -> None:
    for name in _POSITIVE:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if config.picture_frames > _MOST_PICTURE_FRAMES:
        raise ValueError(f"--picture_frames {config.picture_frames}: expected at most {_MOST_PICTURE_FRAMES}")
    for name in _NOT_NEGATIVE:
        if not (value := getattr(config, name)) >= 0:
            raise ValueError(f"--{name} {value}: expected 0 or more")
    for name in _SHARES:
        if not 0 <= (value := getattr(config, name)) < 1:
            raise ValueError(f"--{name} {value}: expected at least 0 and less than 1")
    if not (config.learning_rate > 0 and math.isfinite(config.learning_rate)):
        raise ValueError(f"--learning_rate {config.learning_rate}: expected a positive number")
    if not 0 <= config.noise_end_fraction <= 1:
        raise ValueError(f"--noise_end_fraction {config.noise_end_fraction}: expected 0 to 1")
    if config.use_val_set and not 0 < config.val_fraction < 1:
        raise ValueError(f"--val_fraction {config.val_fraction}: expected between 0 and 1")


def check_dataset(config: FinetuneConfig) -> None:
    """Every dataset is known and can serve what the flags ask for.

    Raises:
        ValueError: for an unknown dataset, or one with fewer images or no state where the flags ask for them.
        FileNotFoundError: if a dataset's folder or its shards are missing.
    """
    for spec, _ in dataset_specs(config):
        spec.camera_keys(config.num_images_in_input)
        if config.use_proprio and spec.state_key is None:
            raise ValueError(f"--use_proprio True: dataset {spec.name!r} has no state; set it to False")
        check_folder(config.data_root_dir, spec)


def check_checkpoint(config: FinetuneConfig) -> None:
    """The checkpoint to start from is whole and of this architecture, and its pruner can be trained with these flags.

    Raises:
        FileNotFoundError: naming the missing folder or file.
        ValueError: for a damaged file, weights that do not fit `config.json`, a pruner that cannot be trained so, and
            a diffusion head of another number of steps.
    """
    resumption = find_resumption(config, int(os.environ.get("WORLD_SIZE", "1")))
    if resumption is not None:
        folder = resumption.folder
    else:
        folder = resolve(config.vla_path)
        check_loadable(folder)
    if config.use_diffusion:
        config_json, _ = read_config(folder)
        if head_kind(folder, config_json) == "diffusion":
            diffusion_steps(config_json, config.num_diffusion_steps_train)
    spec = resolve_pruner(config.pruner, read_json(folder / "config.json").get("pruner"), "training")
    check_form(config, spec)
    if spec.has_parameters:
        _, model_config = read_config(folder)
        model_config.pruner, model_config.num_images_in_input = spec.to_json(), config.num_images_in_input
        check_pruner(model_config)


def check_run_folder(config: FinetuneConfig) -> None:
    """Raises OSError if nothing can be written. Makes the folder, but for a dry run."""
    folder = config.run_dir
    try:
        if config.dry_run:
            folder = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        else:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write into {config.run_dir} ({error.strerror}); choose another --run_root_dir"
        ) from error


def preflight(config: FinetuneConfig) -> None:
    """All checks, cheapest first. Raises ValueError, FileNotFoundError or OSError with the remedy."""
    check_flags(config)
    resolve_device(config.device)
    check_dataset(config)
    check_checkpoint(config)
    check_run_folder(config)
