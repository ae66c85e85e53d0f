"""The policy that a run trains, as its flags ask: what a checkpoint holds, what is new, adapters, what is trained."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from prismatic.checkpoints.components import new_head
from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.files import STATISTICS_FILE
from prismatic.checkpoints.options import LoadOptions
from prismatic.models.diffusion import NUM_TRAIN_STEPS
from prismatic.models.lora import attach_lora
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.models.token_pruner import TokenPruner
from prismatic.stored_files import component_file, read_json
from prismatic.training.config import RECOMPUTED, FinetuneConfig
from prismatic.training.heads import wanted_head
from prismatic.training.pruning import compact_form
from prismatic.training.runs.computing import Computing, choose_computing
from prismatic.training.step import TrainableVLA, choose_trained
from prismatic.vla.robots import RobotSpec, misfits

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """A policy, ready to be trained.

    Attributes:
        checkpoint: model, head, projector and processor.
        lora: how adapters were attached, or None.
        module: all that computes the loss.
        trained: name -> trained parameter (float32).
    """

    checkpoint: Checkpoint
    lora: LoraConfig | None
    module: TrainableVLA
    trained: dict[str, nn.Parameter]


def assemble(
    config: FinetuneConfig,
    folder: Path,
    device: torch.device,
    robot: RobotSpec,
    on_meta: bool = False,
    computing: Computing | None = None,
) -> Parts:
    """Load a checkpoint and make of it what the flags ask for.

    Args:
        config: the flags.
        folder: the checkpoint.
        device: to train on. Weights that processes share are left on the CPU, where files are mapped into memory.
        robot: of the data.
        on_meta: leave the weights where they are: everything is as it would be on `device`, but on the meta device.
        computing: how the run computes; None: what is quickest here.

    Raises ValueError where checkpoint, data and flags do not fit.
    """
    place = torch.device("meta" if on_meta else "cpu" if config.sharding != "none" else device)
    computing = computing or choose_computing(config, folder, device)
    with place if on_meta else nullcontext():
        checkpoint = _load(config, folder, computing, robot, place)
        checkpoint.model.enable_gradient_checkpointing(*RECOMPUTED[config.gradient_checkpointing])
        lora = attach_lora(checkpoint.model, config.lora_rank, config.lora_dropout) if config.use_lora else None
    pruner = checkpoint.model.pruner
    if isinstance(pruner, TokenPruner):
        pruner.compact = compact_form(config)
        if config.compact_training and not pruner.compact:
            log.info("--lora_dropout > 0: duplicates of a token differ, so training keeps one row per query (slower)")
    assert checkpoint.action_head is not None  # _load has made one
    module = TrainableVLA(checkpoint.model, checkpoint.action_head, checkpoint.proprio_projector, computing.bf16).to(
        place
    )
    # Where processes share the weights, each casts its own share.
    return Parts(checkpoint, lora, module, choose_trained(module, in_float32=on_meta or config.sharding == "none"))


def frozen_dtype(config: FinetuneConfig, computing: Computing) -> torch.dtype | None:
    """Of weights that are not trained; None: what they are stored in, since beside adapters they may stay small."""
    return None if config.use_lora and computing.bf16 else torch.float32


def _load(
    config: FinetuneConfig, folder: Path, computing: Computing, data_robot: RobotSpec, place: torch.device
) -> Checkpoint:
    """Model, head and projector, in the dtype that training needs; missing parts are new."""
    recorded = read_json(folder / "config.json")
    pruner = resolve_pruner(config.pruner, recorded.get("pruner"), "training")
    dtype = frozen_dtype(config, computing)
    if config.sharding != "none" and place.type == "cpu" and not _rounds_as_stored(folder, pruner):
        dtype = None  # files stay mapped into memory; `shard` casts what it takes of them
    options = LoadOptions(
        dtype=dtype,
        pruner=pruner,
        num_images_in_input=config.num_images_in_input,
        use_proprio=None if config.use_proprio else False,
        robot=_robot_to_load(folder, recorded.get("robot"), data_robot),
        action_readout="aligned",
        new_pruner=True,
        device=place,
        num_diffusion_steps_train=config.num_diffusion_steps_train if config.use_diffusion else None,
    )
    checkpoint = load_checkpoint(folder, options)
    _check_robot(checkpoint.model.robot, data_robot, config)
    _add_new_parts(config, checkpoint, folder)
    checkpoint.model.config.center_crop = config.image_aug
    computing.apply(checkpoint.model)
    return checkpoint


def _rounds_as_stored(folder: Path, pruner: PrunerSpec) -> bool:
    """Whether loading in the dtype of the weight files rounds something: FiLM's maps, or a trained pruner."""
    return pruner.has_parameters or component_file(folder, "vision_backbone") is not None


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
    spec = model.config.pruner_spec
    finds_number = spec.name != "none" and spec.tokens(model.num_visual_tokens) is None
    # The original base has statistics in its config alone, of robots that it was pretrained on.
    tuned = checkpoint.dataset_statistics and (folder / STATISTICS_FILE).is_file()
    if held is None and not tuned and finds_number:
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
