"""What the flags may say where a server holds the policy."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.robot.libero.config import EvaluationConfig

CHECKPOINT_FLAGS = (
    "pretrained_checkpoint",
    "use_l1_regression",
    "use_diffusion",
    "num_diffusion_steps_train",
    "num_diffusion_steps_inference",
    "use_film",
    "num_images_in_input",
    "use_proprio",
    "center_crop",
    "unnorm_key",
    "load_in_8bit",
    "load_in_4bit",
    "pruner",
    "action_readout",
    "action_head",
    "device",
    "dtype",
)
"""Flags about a checkpoint that this process loads."""
MAX_TIMEOUT_S = 10**7
"""As long as one may wait for an answer; the clocks of operating systems end somewhere."""
REMOTE_FLAGS = ("policy_convention", "policy_timeout_s")


def check_remote_flags(config: EvaluationConfig) -> None:
    """Raises ValueError for flags of a checkpoint with a server and the other way round; ImportError for want of it."""
    defaults = {field.name: field.default for field in fields(config)}
    foreign = REMOTE_FLAGS if config.policy_url is None else CHECKPOINT_FLAGS
    given = [name for name in foreign if getattr(config, name) != defaults[name]]
    if config.policy_url is None:
        if given:
            raise ValueError(f"--{given[0]} is about a policy server; give its address by --policy_url ws://host:port")
        return
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"{flags}: for a checkpoint, not for the server of --policy_url; leave out, and set it there")
    if config.control == "random_tokens":
        raise ValueError("--control random_tokens needs the policy in this process: give --pretrained_checkpoint")
    if not 0 < config.policy_timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(
            f"--policy_timeout_s {config.policy_timeout_s}: expected seconds, more than 0 and at most {MAX_TIMEOUT_S}"
        )
    if missing := [name for name in ("websockets", "msgpack") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"--policy_url needs {' and '.join(missing)}: pip install 'lightvla[serve]'")
