"""Writes checkpoint folders in the published layout, and reads the training state that lies beside one."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prismatic.checkpoints.atomic_folder import new_folder
from prismatic.checkpoints.components import component_states, on_host
from prismatic.checkpoints.directory import Checkpoint
from prismatic.checkpoints.files import STATISTICS_FILE
from prismatic.checkpoints.manifest import write_manifest
from prismatic.checkpoints.weight_files import split_into_shards, write_shards
from prismatic.lazy_tensors import LazyTensor, save_finite
from prismatic.models import film
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.precision import stored_dtype
from prismatic.stored_files import component_name, foreign_code_only, load_plain


def save_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    step: int | str,
    weights: Mapping[str, LazyTensor] | None = None,
    training_state: dict[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
    facts: Mapping[str, Any] | None = None,
    components: Mapping[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write a checkpoint in the published layout. It appears whole or, if the process is killed, not at all.

    Weights are made and written one after the other, so the memory needed is that of the largest, whatever the model's.

    Args:
        directory: a folder that does not exist yet, or is empty.
        checkpoint: the parts to write; processor files are written as they stood when it was loaded.
        step: in the names of component files, or "latest".
        weights: what to write instead of the model's own (merged or averaged ones), in the order of its state dict;
            {} writes none.
        training_state: tensors and plain data for resuming, written to `training_state/`.
        extra: writes further files into the folder it is given, which become part of the same atomic write.
        facts: plain data for the checkpoint's manifest.
        components: states of head and projectors (`component_states`) to write instead of the checkpoint's own.

    Raises:
        FileExistsError: for a folder that holds anything.
        FloatingPointError: naming a tensor that is not finite; nothing is left of the folder then.
        OSError: where the disk is full or the folder cannot be written to; likewise.
    """
    if weights is None:
        weights = {name: LazyTensor.of(value) for name, value in checkpoint.model.state_dict().items()}
    dtype = next((value.dtype for value in weights.values()), None)
    with new_folder(directory) as staging:
        film_state: dict[str, torch.Tensor] = {}
        if weights and film.has_film(checkpoint.model.vision_backbone):
            weights, film_state = _split_film(weights)
        if weights:
            write_shards(staging, split_into_shards(weights), weights, description=None)
        (staging / "config.json").write_text(json.dumps(config_to_write(checkpoint, dtype), indent=2))
        (staging / STATISTICS_FILE).write_text(json.dumps(checkpoint.dataset_statistics, indent=2))
        for name, content in checkpoint.processor_files.items():
            (staging / name).write_bytes(content)
        if components is None:
            components = on_host(component_states(checkpoint.action_head, checkpoint.proprio_projector))
        for component, part in {
            **components,
            "vision_backbone": film_state,
        }.items():
            if part:
                save_finite(part, staging / component_name(component, step))
        del film_state
        if training_state is not None:
            (staging / "training_state").mkdir()
            save_finite(training_state, staging / "training_state" / "state.pt")
        if extra is not None:
            extra(staging)
        write_manifest(staging, step, facts)
    return directory


def _split_film(weights: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, torch.Tensor]]:
    """`film.split_state`; only the vision backbone is made for it."""
    backbone = {name: value.make() for name, value in weights.items() if name.startswith("vision_backbone.")}
    plain, component = film.split_state(backbone)
    others = {name: value for name, value in weights.items() if name not in backbone}
    return {name: LazyTensor.of(value) for name, value in plain.items()} | others, component


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


def load_training_state(directory: Path) -> dict[str, Any]:
    """What `save_checkpoint` stored for resuming.

    Raises FileNotFoundError where the checkpoint has none, and ValueError for a file that is cut off or no such state.
    """
    file = directory / "training_state" / "state.pt"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no training_state/state.pt, so training cannot resume from it; start anew by vla_path"
        )
    state = load_plain(file)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{file} is no training state; start anew by vla_path")
    return state
