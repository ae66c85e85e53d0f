"""How a checkpoint is to be loaded: what `load_checkpoint` and `Policy.from_pretrained` take, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prismatic.checkpoints.components import NO_HEAD, diffusion_steps, head_kind
from prismatic.checkpoints.files import STATISTICS_FILE, read_statistics
from prismatic.extern.hf.configuration_prismatic import check_action_readout, check_switch
from prismatic.extern.hf.original import why_original
from prismatic.models.autoregressive import AUTOREGRESSIVE
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.vla.robots import RobotSpec, get_robot

LOAD_OPTIONS = (
    "num_images_in_input", "use_proprio", "robot", "head", "use_film", "quantization", "attention",
    "num_diffusion_steps_train",
)  # fmt: skip
"""Of `LoadOptions`, what `Policy.from_pretrained` passes on."""


def either(dtype: torch.dtype | str | None, older: torch.dtype | str | None) -> torch.dtype | str | None:
    """`dtype`, or what was given under its older name. Raises TypeError where both were."""
    if dtype is not None and older is not None:
        raise TypeError(f"dtype={dtype} and torch_dtype={older} mean the same; pass dtype alone")
    return older if dtype is None else dtype


def load_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `LoadOptions` takes. Raises TypeError for unknown options, ValueError for an unknown robot."""
    if unknown := sorted(set(options) - set(LOAD_OPTIONS)):
        raise TypeError(
            f"unknown options {unknown} of Policy.from_pretrained; known: device, dtype, unnorm_key, pruner, "
            f"action_readout, center_crop, engine, {', '.join(LOAD_OPTIONS)}, revision, token"
        )
    checked = dict(options)
    if isinstance(robot := checked.get("robot"), str):
        checked["robot"] = get_robot(robot)
    elif not isinstance(robot, RobotSpec | None):
        raise ValueError(f"robot {robot!r} is neither a RobotSpec nor the name of one")
    return checked


def choose_unnorm_key(directory: Path, unnorm_key: str | None) -> str:
    """The dataset whose statistics apply. Raises ValueError listing the known ones."""
    known = sorted(read_statistics(directory))
    if unnorm_key is None and len(known) == 1:
        return known[0]
    if unnorm_key not in known:
        has_file = (directory / STATISTICS_FILE).is_file()
        nothing = f"{STATISTICS_FILE}, which goes before norm_stats in config.json, is empty; remove or recompute it"
        listed = ", ".join(known) or f"none: {nothing if has_file else f'the checkpoint has no {STATISTICS_FILE}'}"
        raise ValueError(f"unnorm_key={unnorm_key!r} names no dataset of {directory}; known: {listed}")
    return unnorm_key


def assumed_original(directory: Path, config_json: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why a checkpoint without a head is run as an original one, and what that means; its `head` is then set in place.

    None where there is a head or one is asked for. Raises FileNotFoundError where there is none and nothing says how it
    acts, and ValueError for several images.
    """
    if head_kind(directory, config_json, options.get("head")) is not None:
        return None
    if (original := why_original(directory, config_json)) is None:
        raise FileNotFoundError(NO_HEAD.format(directory))
    if (images := options.get("num_images_in_input")) not in (None, 1):
        raise ValueError(
            f"{directory}: {original}. An original reads one image, but num_images_in_input={images} was asked for; "
            "fetch its .pt files, or say which head it has by head= (--action_head): 'discrete' (tokens in parallel) "
            "or 'autoregressive' (an original)"
        )
    options["head"] = AUTOREGRESSIVE
    return (
        f"{original}. It decodes its action tokens one after another, one action per policy query, from one image "
        "without pruner and state; head='discrete' (--action_head discrete) decodes chunks in parallel"
    )


@dataclass(frozen=True)
class LoadOptions:
    """What to decide about a checkpoint while loading it; None follows what the checkpoint records.

    Attributes:
        device: where the parts go.
        dtype: of all parameters; None keeps the stored one.
        pruner: overrides the recorded pruner.
        action_readout: "aligned" or "tail".
        num_images_in_input: images per sample.
        use_proprio: whether the state is read; None: when the checkpoint has a proprio projector.
        robot: overrides the recorded robot.
        new_pruner: whether a pruner with parameters may begin with new ones where the checkpoint has none; else that is
            an error.
        attention: of the LLM, "sdpa" or "eager"; None: eager on a CPU, where it is the faster one, else sdpa.
        head: "l1", "diffusion", "discrete" or "autoregressive", which the checkpoint must then hold or leave open;
            None: whichever it holds or records.
        use_film: whether it must have FiLM (True) or must not (False); None: as it is.
        quantization: "fp8", "8bit" or "4bit" weights of the LLM, for inference on a GPU; None: as stored.
        num_diffusion_steps_train: of a diffusion head, where `config.json` does not record it; None: 50 then.
    """

    device: str | torch.device = "cpu"
    dtype: torch.dtype | None = None
    pruner: PrunerSpec | None = None
    action_readout: str | None = None
    num_images_in_input: int | None = None
    use_proprio: bool | None = None
    robot: RobotSpec | None = None
    new_pruner: bool = False
    attention: str | None = None
    head: str | None = None
    use_film: bool | None = None
    quantization: str | None = None
    num_diffusion_steps_train: int | None = None


def checked_options(options: LoadOptions) -> LoadOptions:
    """The options. Raises ValueError for a value that is none of its choices."""
    if options.action_readout is not None:
        check_action_readout(options.action_readout)
    for name in ("use_proprio", "use_film"):
        check_switch(name, getattr(options, name))
    if options.attention not in (None, "sdpa", "eager"):
        raise ValueError(f"attention {options.attention!r} is unknown; known: sdpa, eager")
    images = options.num_images_in_input
    if isinstance(images, bool) or not isinstance(images, int | None):
        raise ValueError(f"num_images_in_input {images!r} should be a number of images")
    diffusion_steps({}, options.num_diffusion_steps_train)
    return options
