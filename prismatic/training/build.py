"""From flags to the parts of a run: model, adapters, head, data, optimiser, restored state."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from prismatic.checkpoints.files import check_complete, resolve
from prismatic.checkpoints.saving import load_training_state
from prismatic.checkpoints.weight_files import fingerprint
from prismatic.models.precision import stored_dtype
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import Frames, TrainingData
from prismatic.training.distributed import Ranks
from prismatic.training.ema import WeightAverage
from prismatic.training.health import Health
from prismatic.training.loading import BadSamples
from prismatic.training.parallel.sharding import shard
from prismatic.training.parts import assemble, frozen_dtype
from prismatic.training.planning.text import tell_plan
from prismatic.training.preemption import StopRequest
from prismatic.training.runs.computing import Computing, agreed_computing
from prismatic.training.runs.folder import RunFolder
from prismatic.training.runs.identity import ANNOUNCED, Change
from prismatic.training.runs.resuming import Resumption, base_of, check_agreement, check_data, find_resumption
from prismatic.training.runs.saving import Facts, Saver, Training
from prismatic.training.step import TrainableVLA, make_optimizer

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that the loop needs.

    Attributes:
        config: the flags.
        ranks: this process among the others.
        module: what is trained; its forward pass is the loss.
        parallel: `module`, wrapped for several processes where there are several that hold all weights each.
        training: what changes, and survives in checkpoints.
        noise: kind of the pruner's noise.
        data: the datasets that the frames are of.
        train_data: frames to learn from.
        val_data: held-out frames, of all datasets, or None.
        stop: whether this process was asked to end.
        saver: writes checkpoints.
        bad_samples: stored pictures that could not be decoded.
        health: what is done about steps that are not finite.
        changes: flags that are others than when the run began.
    """

    config: FinetuneConfig
    ranks: Ranks
    module: TrainableVLA
    parallel: TrainableVLA | DistributedDataParallel
    training: Training
    noise: str
    data: TrainingData
    train_data: Frames
    val_data: Frames | None
    stop: StopRequest
    saver: Saver
    bad_samples: BadSamples
    health: Health
    changes: list[Change]


def open_run(
    config: FinetuneConfig, ranks: Ranks, resumption: Resumption | None
) -> tuple[str, Path, TrainingData, Computing]:
    """Open the data, see that they and the flags are the run's, and tell the plan; all processes call it.

    That is all that `--dry_run True` does.

    Returns:
        The run's base (`base_of`), the folder that weights are loaded from, the data, and how to compute.

    Raises ValueError and FileNotFoundError as `build` does.
    """
    base = base_of(config, resumption)
    # Averaged or merged weights are no basis to go on from: the raw ones are in the training state, and what adapters
    # leave alone is in the checkpoint that the run began with.
    folder = resolve(base) if resumption is None or config.use_lora else resumption.folder
    with ranks.together(ValueError, OSError):  # as long as one of them compares shards with their checksums
        data = TrainingData(config)
    check_agreement(config, data.fingerprints, ranks)
    if resumption is not None:
        check_data(data.fingerprints, resumption)
    with ranks.together(ValueError, OSError):
        computing = agreed_computing(config, folder, ranks, resumption)
    tell_plan(config, ranks, folder, data, resumption.step if resumption else 0, computing)
    return base, folder, data, computing


def build(config: FinetuneConfig, ranks: Ranks, resumption: Resumption | None = None) -> Run:
    """Load and connect all parts, and restore the state of a run that goes on; all processes call it.

    Raises:
        ValueError, FileNotFoundError: for checkpoints or data that do not fit, with the remedy.
    """
    base, folder, data, computing = open_run(config, ranks, resumption)
    torch.manual_seed(config.seed)
    parts = assemble(config, folder, ranks.device, data.robot, computing=computing)
    checkpoint, lora, module, trained = parts.checkpoint, parts.lora, parts.module, parts.trained
    if config.sharding != "none":
        trained = shard(module, ranks, frozen_dtype(config, computing))
    facts = _facts(config, ranks, base, resumption.state if resumption else None, data)
    facts.computing = computing.to_json()
    checkpoint.model.config.base_fingerprint = facts.base_fingerprint if lora else None
    checkpoint.dataset_statistics = data.statistics
    train_data, val_data = data.frames(
        partial(checkpoint.transform, center_crop=config.image_aug, use_proprio=config.use_proprio)
    )
    training = Training(
        checkpoint=checkpoint,
        trained=trained,
        optimizer=make_optimizer(trained, config),
        average=WeightAverage(trained, config.ema_decay) if config.ema_decay > 0 else None,
        lora=lora,
        stored_dtype=stored_dtype(checkpoint.config_json),
        facts=facts,
    )
    if resumption is not None:
        training.load_state_dict(resumption.state)
        log.info("resuming %s behind step %d", resumption.folder, training.step)
        for change in resumption.changes:
            log.warning("%s: %s", change, ANNOUNCED[change.flag])
    saver = Saver(training, config, ranks)
    return Run(
        config=config,
        ranks=ranks,
        module=module,
        parallel=module if config.sharding != "none" else _parallel(module, ranks),
        training=training,
        noise=checkpoint.model.config.pruner_spec.noise,
        data=data,
        train_data=train_data,
        val_data=val_data,
        stop=StopRequest(),
        saver=saver,
        bad_samples=BadSamples(config.max_bad_samples, ranks),
        health=Health(config, ranks, saver, train_data),
        changes=resumption.changes if resumption else [],
    )


def agreed_resumption(config: FinetuneConfig, ranks: Ranks) -> Resumption | None:
    """The main process decides from which checkpoint the run goes on, and the others read the same one.

    All processes call it, while the main one holds the run. Raises as `find_resumption`.
    """
    run = RunFolder(config.run_dir)
    found = None
    with ranks.together(ValueError, OSError):
        if ranks.is_main:
            run.clear_leftovers()
            found = find_resumption(config, ranks.world_size)
    # The state, gigabytes of it, each process reads itself.
    told, *_ = ranks.gather(replace(found, state={}) if found else None)
    return found if ranks.is_main or told is None else replace(told, state=load_training_state(told.folder))


def check_finished(config: FinetuneConfig, ranks: Ranks, resumption: Resumption) -> None:
    """Raises ValueError where a finished run is not the one that the flags mean: another base model, or other data."""
    with ranks.together(ValueError, OSError):
        data = TrainingData(config)
    check_data(data.fingerprints, resumption)
    _facts(config, ranks, base_of(config, resumption), resumption.state, data)


def _facts(
    config: FinetuneConfig, ranks: Ranks, base: str, state: Mapping[str, Any] | None, data: TrainingData
) -> Facts:
    """What the run is trained on. Raises ValueError where it began with other weights than `base` now holds."""
    recorded = (state or {}).get("base_fingerprint")
    found = None
    with ranks.together(ValueError, OSError):
        if ranks.is_main:  # only the process that saves needs it
            if config.use_lora or recorded is None or Path(base).is_dir():  # all weights trained, it may be gone
                found = fingerprint(check_complete(resolve(base)))
            if found is not None and recorded not in (None, found):
                raise ValueError(
                    f"the run was trained on weights {recorded}, but {base} now holds {found}; put the base model back "
                    "there"
                )
    return Facts(
        base=base,
        base_fingerprint=recorded or found,
        data=data.fingerprints,
        schedule_steps=(state or {}).get("schedule_steps", config.max_steps),
        samples_per_step=config.samples_per_step(ranks.world_size),
    )


def _parallel(module: TrainableVLA, ranks: Ranks) -> TrainableVLA | DistributedDataParallel:
    if ranks.world_size == 1:
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
