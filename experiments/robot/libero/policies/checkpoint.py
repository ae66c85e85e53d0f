"""Loads the checkpoint that is to be evaluated, as the flags ask."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.robot.libero.settings.controls import TOKEN_CONTROLS
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.settings.suite_names import SUITES, suites_of
from experiments.robot.libero.simulator.environment import CAMERAS
from prismatic.checkpoints.components import diffusion_steps, head_kind
from prismatic.checkpoints.files import STATISTICS_FILE, check_statistics, read_statistics, resolve
from prismatic.checkpoints.options import choose_unnorm_key
from prismatic.extern.hf.original import why_original
from prismatic.models.autoregressive import AUTOREGRESSIVE
from prismatic.models.diffusion import NUM_TRAIN_STEPS, DiffusionActionHead
from prismatic.models.quantization import KINDS, check_quantization
from prismatic.policy import Policy
from prismatic.stored_files import read_json
from prismatic.vla.robots import LIBERO

logger = logging.getLogger(__name__)

_DENOISING_STEPS = 50
"""What `--num_diffusion_steps_inference` is by default in OpenVLA-OFT, where the head was trained with as many."""


def load_policy(config: EvaluationConfig, device: torch.device | str = "cpu") -> Policy:
    """Load the checkpoint as the flags ask.

    Raises:
        FileNotFoundError, ValueError: as `Policy.from_pretrained`; and when the flags ask for another number of images
            than the checkpoint was trained with, more actions than a chunk has, or a robot that is not LIBERO's.
    """
    directory = resolve(config.pretrained_checkpoint)
    config_file = directory / "config.json"
    config_json = read_json(config_file) if config_file.is_file() else {}
    recorded = config_json.get("num_images_in_input")
    if None not in (recorded, config.num_images_in_input) and recorded != config.num_images_in_input:
        raise ValueError(
            f"--num_images_in_input {config.num_images_in_input}: {directory} was trained with {recorded}; "
            "leave the flag out"
        )
    suites = suites_of(config.task_suite_name)
    if len(suites) > 1:
        _keys_of_suites(directory, config)  # what cannot be chosen is said before gigabytes are read
    head = wanted_head(config, directory, config_json)
    _check_denoising(config, head_kind(directory, config_json, head), directory, config_json)
    policy = Policy.from_pretrained(
        config.pretrained_checkpoint,
        device=device,
        dtype=config.dtype,
        unnorm_key=config.unnorm_key or _suite_key(directory, suites[0]),
        pruner=config.pruner,
        action_readout=config.action_readout,
        center_crop=config.center_crop,
        engine=config.engine,
        num_images_in_input=config.num_images_in_input,
        use_proprio=config.use_proprio,
        head=head,
        use_film=config.use_film,
        quantization=quantization_of(config),
        num_diffusion_steps_train=config.num_diffusion_steps_train,
    )
    if isinstance(policy.action_head, DiffusionActionHead):
        most = min(_DENOISING_STEPS, policy.action_head.num_train_steps)
        policy.action_head.num_inference_steps = config.num_diffusion_steps_inference or most
    elif config.num_diffusion_steps_inference is not None:
        logger.warning(
            "--num_diffusion_steps_inference is of diffusion heads, and %s has a head of kind %s: it is not used",
            directory,
            policy.action_head.kind,
        )
    check_fits(policy, config.num_open_loop_steps, directory)
    if (draw := TOKEN_CONTROLS.get(config.control)) is not None:
        policy.set_pruner(f"random:seed={config.seed}" + (f",draw={draw}" if draw != "instead" else ""))
    return policy


def policies_of_suites(policy: Policy, config: EvaluationConfig) -> dict[str, Policy]:
    """A loaded policy with the statistics of each suite that is evaluated: one model, loaded once.

    Raises ValueError where a suite's statistics cannot be chosen or are no statistics of this robot.
    """
    checkpoint, directory = policy.checkpoint, policy.checkpoint.path
    suites = suites_of(config.task_suite_name)
    found, by_key = {}, {policy.unnorm_key: policy}
    for suite, key in _keys_of_suites(directory, config).items() if len(suites) > 1 else ():
        if key not in by_key:
            check_statistics(directory, key, policy.robot, policy.transform.use_proprio)
            transform = checkpoint.transform(
                key, policy.transform.center_crop, use_proprio=policy.transform.use_proprio
            )
            by_key[key] = Policy(checkpoint, transform, key, policy.engine)
        found[suite] = by_key[key]
    return found


def _keys_of_suites(directory: Path, config: EvaluationConfig) -> dict[str, str]:
    """Suite -> dataset whose statistics apply."""
    return {
        suite: choose_unnorm_key(directory, config.unnorm_key or _suite_key(directory, suite))
        for suite in suites_of(config.task_suite_name)
    }


def _check_denoising(config: EvaluationConfig, head: str | None, directory: Path, config_json: dict[str, Any]) -> None:
    """Raises ValueError where more denoising steps are asked for than the head was trained with."""
    wanted = config.num_diffusion_steps_inference
    if head != "diffusion" or wanted is None:
        return
    trained = diffusion_steps(config_json, config.num_diffusion_steps_train) or NUM_TRAIN_STEPS
    if wanted > trained:
        raise ValueError(
            f"--num_diffusion_steps_inference {wanted}: {directory} was trained with {trained} steps; give at most as "
            "many"
        )


def wanted_head(config: EvaluationConfig, directory: Path, config_json: dict[str, Any]) -> str | None:
    """The kind of head that the flags ask for; None: whatever the folder is.

    The published flags know no original OpenVLA checkpoint, and its own evaluation has none of them: a folder that
    looks like one is run as one, unless they ask for diffusion or `--action_head` for something else.

    Raises ValueError where they ask in so many words for an L1 head that such a folder does not have.
    """
    if config.action_head != "auto":
        return config.action_head
    if config.use_diffusion:
        return "diffusion"
    if config.use_l1_regression and (why := why_original(directory, config_json)):
        raise ValueError(
            f"--use_l1_regression True: {directory}: {why}. Fetch its .pt files, leave the flag out to decode one "
            "action at a time, or give --action_head discrete for chunks of tokens"
        )
    if config_json.get("action_head") == AUTOREGRESSIVE or why_original(directory, config_json):
        return "l1" if config.use_l1_regression else None
    return "discrete" if config.use_l1_regression is False else "l1"


def own_keys(suite: str) -> tuple[str, ...]:
    """Names of a suite's datasets, the closest first: its own, and those of the suite that it perturbs."""
    base = SUITES[suite].base
    return suite, f"{suite}_no_noops", base, f"{base}_no_noops"


def check_fits(policy: Policy, open_loop_steps: int | None, directory: Path) -> None:
    """The policy acts on LIBERO's robot, and its chunks are long enough for what is executed of them.

    Args:
        open_loop_steps: as the flag; None: the robot's.

    Raises:
        ValueError: naming what does not fit.
    """
    robot = policy.robot
    whose = f"{directory} drives robot {robot.name!r}"
    if missing := set(robot.cameras) - set(CAMERAS):
        raise ValueError(f"{whose}, whose cameras {sorted(missing)} LIBERO does not have")
    numbers = [("action", robot.action_dim, LIBERO.action_dim)]
    if policy.transform.use_proprio:
        numbers.append(("state", robot.proprio_dim, LIBERO.proprio_dim))
    for words, found, expected in numbers:
        if found != expected:
            raise ValueError(
                f"{whose}, whose {words} has {found} numbers; LIBERO's has {expected}: evaluate a checkpoint that "
                "was trained on LIBERO"
            )
    if (steps := open_loop_steps or robot.open_loop_steps) > robot.chunk_length:
        raise ValueError(
            f"--num_open_loop_steps {steps}{'' if open_loop_steps else ' (the checkpoint records it)'}: a chunk has "
            f"{robot.chunk_length} actions ({policy.action_head.kind} head); give at most as many"
        )


def _suite_key(directory: Path, suite: str) -> str | None:
    """The suite's own statistics among several, or its base's; None leaves the choice to the policy."""
    holds_some = any((directory / name).is_file() for name in (STATISTICS_FILE, "config.json"))
    known = read_statistics(directory) if holds_some else {}
    return next((key for key in own_keys(suite) if key in known), None)


def scaling_warnings(description: Mapping[str, Any], suites: Sequence[str]) -> list[str]:
    """`statistics_warnings` of every suite that a described policy is evaluated on."""
    keys = description.get("unnorm_keys", {})
    found = [statistics_warnings(str(keys.get(suite, description.get("unnorm_key"))), suite) for suite in suites]
    return [warning for own in found for warning in own]


def statistics_warnings(unnorm_key: str, suite: str) -> list[str]:
    """What to tell where actions are scaled by the statistics of another suite than the one that is evaluated."""
    if unnorm_key in own_keys(suite) or unnorm_key not in {key for other in SUITES for key in own_keys(other)}:
        return []  # a dataset of one's own may well hold this suite's tasks
    return [
        f"states and actions are scaled by the statistics of {unnorm_key}, not of {suite}: the policy was trained on "
        "another suite"
    ]


def quantization_of(config: EvaluationConfig) -> str | None:
    """`8bit`, `4bit`, `fp8` or None. Raises ValueError where flags contradict each other or the machine cannot."""
    kinds = [kind for kind in KINDS if getattr(config, f"load_in_{kind}")]
    if len(kinds) > 1:
        flags = " and ".join(f"--load_in_{kind}" for kind in kinds)
        raise ValueError(f"{flags} exclude each other; give one of them")
    if kinds:
        check_quantization(kinds[0])
    return kinds[0] if kinds else None
