"""Loads the checkpoint that is to be evaluated, as the flags ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from experiments.robot.libero.config import DTYPES, EvaluationConfig, quantization_of
from experiments.robot.libero.environment import CAMERAS
from experiments.robot.libero.suites import SUITES
from prismatic.checkpoint import STATISTICS_FILE, resolve
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.policy import Policy
from prismatic.vla.robots import LIBERO


def load_policy(config: EvaluationConfig, device: torch.device | str = "cpu") -> Policy:
    """Load the checkpoint as the flags ask.

    Raises:
        FileNotFoundError, ValueError: as `Policy.from_pretrained`; and when the flags ask for another number of images
            than the checkpoint was trained with, more actions than a chunk has, or a robot that is not LIBERO's.
    """
    directory = resolve(config.pretrained_checkpoint)
    recorded = _read_json(directory / "config.json").get("num_images_in_input")
    if None not in (recorded, config.num_images_in_input) and recorded != config.num_images_in_input:
        raise ValueError(
            f"--num_images_in_input {config.num_images_in_input}: {directory} was trained with {recorded}; "
            "leave the flag out"
        )
    policy = Policy.from_pretrained(
        config.pretrained_checkpoint,
        device=device,
        dtype=DTYPES[config.dtype] if config.dtype else None,
        unnorm_key=config.unnorm_key or _suite_key(directory, config.task_suite_name),
        pruner=config.pruner,
        action_readout=config.action_readout,
        center_crop=config.center_crop,
        num_images_in_input=config.num_images_in_input,
        use_proprio=config.use_proprio,
        head="l1" if config.use_l1_regression else "diffusion" if config.use_diffusion else "discrete",
        use_film=config.use_film,
        quantization=quantization_of(config),
    )
    if isinstance(policy.action_head, DiffusionActionHead):
        if config.num_diffusion_steps_inference > policy.action_head.num_train_steps:
            raise ValueError(
                f"--num_diffusion_steps_inference {config.num_diffusion_steps_inference}: {directory} was trained with "
                f"{policy.action_head.num_train_steps} steps; give at most as many"
            )
        policy.action_head.num_inference_steps = config.num_diffusion_steps_inference
    check_fits(policy, config.num_open_loop_steps, directory)
    if config.control == "random_tokens":
        policy.set_pruner(f"random:seed={config.seed}")
    return policy


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
            f"{robot.chunk_length} actions; give at most as many"
        )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _suite_key(directory: Path, suite: str) -> str | None:
    """The suite's own statistics among several, or its base's; None leaves the choice to the policy."""
    known = _read_json(directory / STATISTICS_FILE) or _read_json(directory / "config.json").get("norm_stats") or {}
    base = SUITES[suite].base
    return next((key for key in (suite, f"{suite}_no_noops", base, f"{base}_no_noops") if key in known), None)
