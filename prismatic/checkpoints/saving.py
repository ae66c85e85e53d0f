"""Writes checkpoint folders in the published layout, and reads the training state that lies beside one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from prismatic.checkpoints.atomic_folder import commit, finish_pending, new_staging
from prismatic.checkpoints.components import component_states
from prismatic.checkpoints.directory import Checkpoint
from prismatic.checkpoints.files import PROCESSOR_FILES, STATISTICS_FILE, copy_small_files
from prismatic.models import film
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.precision import stored_dtype
from prismatic.stored_files import component_name, foreign_code_only, load_plain


def save_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    step: int | str,
    model_state: dict[str, torch.Tensor] | None = None,
    training_state: dict[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint in the published layout, atomically: a killed process leaves the old one or the new one.

    Args:
        directory: where to; may hold an older checkpoint and other files, which stay.
        checkpoint: the parts to write; processor files are copied byte for byte from `checkpoint.path`.
        step: in the names of component files, or "latest".
        model_state: weights to write instead of the model's own (merged or averaged ones); {} writes none.
        training_state: tensors and plain data for resuming, written to `training_state/`.
        extra: writes further files into the folder it is given, which become part of the same atomic write.
    """
    staging = new_staging(directory)
    state = checkpoint.model.state_dict() if model_state is None else model_state
    tensors = {k: v.detach().cpu() for k, v in state.items()}
    film_state: dict[str, torch.Tensor] = {}
    if film.has_film(checkpoint.model.vision_backbone):
        tensors, film_state = film.split_state(tensors)
    if tensors:
        save_torch_state_dict(tensors, staging, max_shard_size="5GB", metadata={"format": "pt"})
    dtype = next((value.dtype for value in state.values()), None)
    (staging / "config.json").write_text(json.dumps(config_to_write(checkpoint, dtype), indent=2))
    (staging / STATISTICS_FILE).write_text(json.dumps(checkpoint.dataset_statistics, indent=2))
    copy_small_files(checkpoint.path, staging, PROCESSOR_FILES)
    for component, part in {
        **component_states(checkpoint.action_head, checkpoint.proprio_projector),
        "vision_backbone": film_state,
    }.items():
        if part:
            torch.save(part, staging / component_name(component, step))
    if training_state is not None:
        (staging / "training_state").mkdir()
        torch.save(training_state, staging / "training_state" / "state.pt")
    if extra is not None:
        extra(staging)
    commit(staging, directory)
    return directory


def config_to_write(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Any]:
    """`config.json` of a checkpoint: the one it came from, plus what we record; `dtype` of the weights beside it."""
    config = checkpoint.model.config
    # `dtype` is the newer name of `torch_dtype`; a fingerprint belongs to the base of these adapters alone.
    kept = {
        key: value
        for key, value in foreign_code_only(checkpoint.config_json).items()
        if key not in ("dtype", "base_fingerprint")
    }
    own: dict[str, Any] = {"base_fingerprint": config.base_fingerprint} if config.base_fingerprint else {}
    if (head := checkpoint.action_head) is not None:
        own["action_head"] = head.kind
    if isinstance(head, DiffusionActionHead):
        own["num_diffusion_steps_train"] = head.num_train_steps
    return {
        **kept,
        "norm_stats": checkpoint.dataset_statistics,
        "torch_dtype": str(dtype or stored_dtype(checkpoint.config_json)).removeprefix("torch."),
        "pruner": config.pruner_spec.to_json(),
        "action_readout": config.action_readout,
        "robot": checkpoint.model.robot.to_json(),
        "token_ids": config.special_tokens.to_json(),
        "center_crop": config.center_crop,
        "num_images_in_input": checkpoint.model.num_images_in_input,
        "use_proprio": checkpoint.proprio_projector is not None,
        "use_film": film.has_film(checkpoint.model.vision_backbone),
        **own,
    }


def load_training_state(directory: Path, finish: bool = True) -> dict[str, Any]:
    """What `save_checkpoint` stored for resuming; `finish` ends an interrupted save first, which changes the folder.

    Raises FileNotFoundError where the checkpoint has none, and ValueError for a file that is cut off or no such state.
    """
    if finish:
        finish_pending(directory)
    file = directory / "training_state" / "state.pt"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no training_state/state.pt, so training cannot resume from it; start anew by vla_path"
        )
    state = load_plain(file)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{file} is no training state; start anew by vla_path")
    return state
