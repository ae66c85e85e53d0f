"""From flags to the parts of a run: model, adapters, head, data, optimiser, restored state."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from prismatic.checkpoints.components import new_head
from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.files import check_complete, resolve
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import load_training_state
from prismatic.checkpoints.weight_files import fingerprint
from prismatic.models.diffusion import NUM_TRAIN_STEPS
from prismatic.models.lora import attach_lora
from prismatic.models.precision import computes_in_bf16, stored_dtype
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.registry import resolve_pruner
from prismatic.models.token_pruner import TokenPruner
from prismatic.stored_files import component_file, read_json
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import Frames, TrainingData
from prismatic.training.distributed import Ranks
from prismatic.training.ema import WeightAverage
from prismatic.training.heads import wanted_head
from prismatic.training.health import Health
from prismatic.training.loading import BadSamples
from prismatic.training.preemption import StopRequest
from prismatic.training.pruning import compact_form
from prismatic.training.runs.folder import RunFolder
from prismatic.training.runs.identity import ANNOUNCED, Change
from prismatic.training.runs.resuming import Resumption, base_of, check_agreement, check_data, find_resumption
from prismatic.training.runs.saving import Facts, Saver, Training
from prismatic.training.step import TrainableVLA, choose_trained, make_optimizer
from prismatic.vla.robots import RobotSpec, misfits

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that the loop needs.

    Attributes:
        config: the flags.
        ranks: this process among the others.
        module: what is trained; its forward pass is the loss.
        parallel: `module`, wrapped for several processes where there are several.
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


def uses_bf16(config: FinetuneConfig, device: torch.device) -> bool:
    """Whether to compute under bfloat16 autocast. `auto`: on GPUs, and on CPUs with instructions for it."""
    return computes_in_bf16(device) if config.precision == "auto" else config.precision == "bf16"


def build(config: FinetuneConfig, ranks: Ranks, resumption: Resumption | None = None) -> Run:
    """Load and connect all parts, and restore the state of a run that goes on; all processes call it.

    Raises:
        ValueError, FileNotFoundError: for checkpoints or data that do not fit, with the remedy.
    """
    torch.manual_seed(config.seed)
    state = resumption.state if resumption else None
    base = base_of(config, resumption)
    # Averaged or merged weights are no basis to go on from: the raw ones are in the training state, and what adapters
    # leave alone is in the checkpoint that the run began with.
    folder = resolve(base) if resumption is None or config.use_lora else resumption.folder
    with ranks.together(ValueError, OSError):  # as long as one of them compares shards with their checksums
        data = TrainingData(config)
    check_agreement(config, data.fingerprints, ranks)
    if resumption is not None:
        check_data(data.fingerprints, resumption)
    checkpoint = _load(config, folder, ranks.device, data.robot)
    if config.gradient_checkpointing:
        checkpoint.model.enable_gradient_checkpointing()
    lora = attach_lora(checkpoint.model, config.lora_rank, config.lora_dropout) if config.use_lora else None
    facts = _facts(config, ranks, base, state, data)
    checkpoint.model.config.base_fingerprint = facts.base_fingerprint if lora else None
    pruner = checkpoint.model.pruner
    if isinstance(pruner, TokenPruner):
        pruner.compact = compact_form(config)
        if config.compact_training and not pruner.compact:
            log.info("--lora_dropout > 0: duplicates of a token differ, so training keeps one row per query (slower)")
    checkpoint.dataset_statistics = data.statistics
    train_data, val_data = data.frames(
        partial(checkpoint.transform, center_crop=config.image_aug, use_proprio=config.use_proprio)
    )
    assert checkpoint.action_head is not None  # _load has made one
    module = TrainableVLA(
        checkpoint.model,
        checkpoint.action_head,
        checkpoint.proprio_projector,
        uses_bf16(config, ranks.device),
    ).to(ranks.device)
    trained = choose_trained(module)
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
    saver = Saver(training, config)
    return Run(
        config=config,
        ranks=ranks,
        module=module,
        parallel=_parallel(module, ranks),
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
            if found is not None:
                run.go_back_to(found.step)
    # The state, gigabytes of it, each process reads itself.
    told, *_ = ranks.gather(replace(found, state={}) if found else None)
    return found if ranks.is_main or told is None else replace(told, state=load_training_state(told.folder))


def _facts(
    config: FinetuneConfig, ranks: Ranks, base: str, state: Mapping[str, Any] | None, data: TrainingData
) -> Facts:
    """What the run is trained on. Raises ValueError where it began with other weights than `base` now holds."""
    recorded = (state or {}).get("base_fingerprint")
    found = None
    with ranks.together(ValueError, OSError):
        if ranks.is_main:  # only the process that saves needs it
            found = fingerprint(check_complete(resolve(base)))
            if config.use_lora and recorded not in (None, found):
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


def _load(config: FinetuneConfig, folder: Path, device: torch.device, data_robot: RobotSpec) -> Checkpoint:
    """Model, head and projector, in the dtype that training needs; missing parts are new."""
    recorded = read_json(folder / "config.json")
    keep_stored = config.use_lora and uses_bf16(config, device)  # frozen weights may stay small
    options = LoadOptions(
        dtype=None if keep_stored else torch.float32,
        pruner=resolve_pruner(config.pruner, recorded.get("pruner"), "training"),
        num_images_in_input=config.num_images_in_input,
        use_proprio=None if config.use_proprio else False,
        robot=_robot_to_load(folder, recorded.get("robot"), data_robot),
        action_readout="aligned",
        new_pruner=True,
        device=device,
        num_diffusion_steps_train=config.num_diffusion_steps_train if config.use_diffusion else None,
    )
    checkpoint = load_checkpoint(folder, options)
    _check_robot(checkpoint.model.robot, data_robot, config)
    _add_new_parts(config, checkpoint, folder)
    checkpoint.model.config.center_crop = config.image_aug
    if device.type == "cpu":
        _prefer_plain_attention(checkpoint)
    return checkpoint


def _add_new_parts(config: FinetuneConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """Give the checkpoint what the flags ask for and it does not hold, and say what was loaded and what is new."""
    model, wanted = checkpoint.model, wanted_head(config)
    robot, width = model.robot, model.config.llama.hidden_size
    held = checkpoint.action_head.kind if checkpoint.action_head is not None else None
    origin = {} if wanted == "discrete" else {f"{wanted} action head": held == wanted}
    if held != wanted:
        if held is not None:
            log.warning("the checkpoint's action head is of kind %s and is left out", held)
        if wanted == "diffusion":
            model.config.num_diffusion_steps_train = config.num_diffusion_steps_train or NUM_TRAIN_STEPS
        checkpoint.action_head = new_head(model, wanted)
        model.config.action_head = wanted
    if config.use_proprio:
        origin["proprio projector"] = checkpoint.proprio_projector is not None
        checkpoint.proprio_projector = checkpoint.proprio_projector or ProprioProjector(width, robot.proprio_dim)
    if model.config.use_film and not config.use_film:
        raise ValueError(f"{folder} has FiLM, which cannot be taken out again; pass --use_film True")
    if config.use_film:
        origin["FiLM"] = model.config.use_film
        model.enable_film()
    for name, found in origin.items():
        log.info("%s: %s", name, f"loaded from {folder}" if found else "new")
    if held is None and not checkpoint.dataset_statistics and model.config.pruner_spec.name != "none":
        log.warning(
            "%s was never tuned to act, and a pruner that starts so keeps too few tokens: first fine-tune with "
            "--pruner none, then with the pruner from that run, or set --pruner lightvla:min_tokens=64",
            folder,
        )


def _robot_to_load(folder: Path, recorded: dict[str, Any] | None, data: RobotSpec) -> RobotSpec | None:
    """The data's robot where the checkpoint names none, or names one that nothing in it depends on; else None."""
    if recorded is None:
        return data
    has_parts = any(component_file(folder, name) for name in ("action_head", "proprio_projector"))
    return None if has_parts or not misfits(RobotSpec.from_json(recorded), data) else data


def _check_robot(recorded: RobotSpec, data: RobotSpec, config: FinetuneConfig) -> None:
    """The checkpoint's robot stays what it is, but the data must fit it."""
    for name in misfits(recorded, data):
        ours, theirs = getattr(recorded, name), getattr(data, name)
        raise ValueError(
            f"{config.vla_path} was made for robot {recorded.name!r} ({name} {ours}), but dataset "
            f"{config.dataset_name!r} is of {data.name!r} ({name} {theirs}); take another checkpoint"
        )


def _prefer_plain_attention(checkpoint: Checkpoint) -> None:
    """torch's fused attention in the ViTs is the slower one on CPUs, above all backwards."""
    for vit in checkpoint.model.vision_backbone.vits:
        for module in vit.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010 - an attribute that nn.Module does not know


def _parallel(module: TrainableVLA, ranks: Ranks) -> TrainableVLA | DistributedDataParallel:
    if ranks.world_size == 1:
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
