"""Original OpenVLA checkpoints: how a folder is recognised as one, and what its configuration then means."""

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.models.autoregressive import AUTOREGRESSIVE
from prismatic.stored_files import component_files, read_json

logger = logging.getLogger(__name__)

_RECORDED_LATER = (
    "pruner", "action_head", "action_readout", "robot", "center_crop", "num_images_in_input", "use_proprio", "use_film",
)  # fmt: skip


def why_original(directory: Path, config_json: Mapping[str, Any]) -> str | None:
    """Why a folder is taken for an original OpenVLA checkpoint, in words; None where it is not taken for one.

    Nothing in such a folder says so: it is known by what is missing.

    - There are statistics (in `config.json`, or a file of their own), so the model was trained to act.
    - There is no `*--*_checkpoint.pt` and no `lora_adapter/`, which OpenVLA-OFT and this project write beside the
      weights (head, proprio projector, FiLM). Other `.pt` files, such as a trainer's settings, say nothing.
    - `config.json` has none of the keys in which this project records how a model acts.

    Without `dataset_statistics.json` it is OpenVLA's pre-training as published. With that file it was fine-tuned: by
    OpenVLA, or by OpenVLA-OFT with discrete tokens decoded in parallel from one image without the state, which leaves
    the same files; so does a checkpoint whose `.pt` files were not fetched. The former is assumed, the reason says so,
    and whoever loads it may ask for another kind of head.
    """
    if component_files(directory) or (directory / "lora_adapter").is_dir():
        return None
    if any(config_json.get(key) is not None for key in _RECORDED_LATER):
        return None
    fine_tuned = (directory / "dataset_statistics.json").is_file()
    if not (fine_tuned or config_json.get("norm_stats")):
        return None
    doubt = "; a discrete parallel one, or one whose .pt files were not fetched, looks the same" if fine_tuned else ""
    return f"no *--*_checkpoint.pt file and no record of how it acts: assumed an original OpenVLA checkpoint{doubt}"


def as_original(config: OpenVLAConfig) -> None:
    """Let the configuration mean an original checkpoint where it says nothing: one image, one action, no pruner."""
    config.action_head = AUTOREGRESSIVE
    config.pruner = config.pruner or {"name": "none"}
    config.num_images_in_input = config.num_images_in_input or 1
    config.robot = dataclasses.replace(config.robot_spec, chunk_length=1, open_loop_steps=1).to_json()


def original_config(folder: Path, config: OpenVLAConfig | None) -> OpenVLAConfig | None:
    """The configuration under which a local folder acts as an original checkpoint.

    None where it is not taken for one, where there is no such folder, and where `config` already says how it acts.
    """
    file, says = folder / "config.json", config is not None and (config.pruner or config.action_head)
    if says or not file.is_file() or (why := why_original(folder, read_json(file))) is None:
        return None
    logger.warning("%s: %s, which decodes one action per call, token by token", folder, why)
    own = OpenVLAConfig.from_pretrained(folder) if config is None else copy.deepcopy(config)
    as_original(own)
    return own
