"""Flags of the commands: fields of a dataclass, read by draccus, with errors that one can act on."""

import dataclasses
import difflib
import os
import re
import socket
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import draccus
from draccus.utils import DraccusException

from prismatic.command_status import UNUSABLE, print_error
from prismatic.flag_help import help_text

Config = TypeVar("Config")

_SAME_WORD = 0.8
"""How alike (`difflib`) a mistyped flag is to the one that was meant; below, a guess leads astray."""

_NO_OTHER_MODEL = "models other than Llama's are not run here; leave it out"
_NO_RECIPE = (
    "training recipes are not part of this project; say it by --vla_path, --dataset_name, --batch_size and so on"
)
PUBLISHED_ELSEWHERE = {
    # OpenVLA, vla-scripts/finetune.py
    "save_steps": "here it is --save_freq",
    "adapter_tmp_dir": "not needed: adapters are merged without a folder of their own; leave it out",
    "use_quantization": "weights are not quantized in training; --gradient_checkpointing True needs less memory, too",
    # OpenVLA, vla-scripts/train.py
    "vla": _NO_RECIPE,
    "save_interval": "here it is --save_freq",
    "is_resume": "here it is --resume",
    "resume_epoch": "there are no epochs; here it is --resume_step",
    "trackers": "metrics.jsonl and TensorBoard's files are always written; for Weights & Biases give --use_wandb True",
    "hf_token": "give the token as the environment variable HF_TOKEN, or run: hf auth login",
    "run_id": "here it is --run_id_override",
    # OpenVLA-OFT and VLA-Adapter, vla-scripts/finetune.py
    "num_diffusion_steps": "here it is --num_diffusion_steps_train, and --num_diffusion_steps_inference in evaluation",
    "vlm_path": "a checkpoint holds its vision-language model; here it is --vla_path",
    "config_file_path": "a checkpoint holds its configuration; here it is --vla_path",
    "resum_vla_path": "here it is --vla_path with --resume True",
    "use_minivlm": _NO_OTHER_MODEL,
    "use_pro_version": "VLA-Adapter's heads are not run here; leave it out",
    "phase": "the command says whether it trains; leave it out",
    "phase1_path": "VLA-Adapter's heads are not run here; leave it out",
    "use_fz": "a model whose weights all stand still is not trained here; leave it out, and give --use_lora True",
    # Evaluations: VLA-Adapter's and OpenVLA-OFT's, openpi's, LeRobot's
    "save_version": "here it is --run_id_note",
    "replan_steps": "here it is --num_open_loop_steps",
    "host": "here it is --policy_url ws://host:port",
    "port": "here it is --policy_url ws://host:port",
    "video_out_path": "here it is --save_rollout_video True, with --output_dir",
    "n_action_steps": "here it is --num_open_loop_steps",
    "policy": "here it is --pretrained_checkpoint, or --policy_url",
    "env": "here it is --task_suite_name",
    "eval": "here it is --num_trials_per_task, and --num_envs",
}
"""Flags of other projects' published commands -> what stands for them here. `--vla.type` is found under `vla`."""


class FlagError(ValueError):
    """The command line cannot be read."""


def parse_flags(config_class: type[Config], words: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for; `~` at the start of a path is the home folder.

    Args:
        config_class: a dataclass; its fields are the flags.
        words: None: those of this process. `None` is the value None of a flag that may have it.

    Raises:
        FlagError: for an unknown flag, one without a value, a value of another type, or a `--config_path` that cannot
            be read.
        SystemExit: behind the help, where the words ask for it.
    """
    words = list(sys.argv[1:] if words is None else words)
    if {"--help", "-h"} & {*words}:
        sys.stdout.write(help_text(config_class, os.path.basename(sys.argv[0])))
        sys.exit(0)
    known = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        name, has_value, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            continue
        if name.partition(".")[0] not in (*known, "config_path"):
            raise FlagError(f"unknown flag --{name}{_meant(name, known)} (--help lists all)")
        if not has_value and following.startswith("--"):
            raise FlagError(f"--{name} has no value; give one after it, such as True or a number (--help lists all)")
    try:
        config = draccus.parse(config_class, args=_with_null(words, _optional(config_class)))
        find_home(config)
    except (DraccusException, OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder is known
        raise FlagError(_as_flags(str(error).strip())) from error
    return config


def _as_flags(message: str) -> str:
    """draccus's words for a missing flag, or for a value that is none, by the flag's name."""
    if missing := re.fullmatch(r"Missing required field\(s\) (.*) for \w+", message):
        names = ", ".join(f"--{name}" for name in re.findall(r"\w+", missing[1]))
        return f"{names} must be given (--help lists all)"
    return re.sub(r"^`(\w+)`: ", r"--\1: ", message)


def find_home(config: object) -> None:
    """Make paths of a dataclass's fields that begin with `~`, which a shell leaves behind `--flag=`, whole, in place.

    Raises RuntimeError where no home folder is known.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, Path):
            setattr(config, field.name, value.expanduser())
        elif isinstance(value, str) and value.startswith("~/"):
            setattr(config, field.name, str(Path(value).expanduser()))


def _meant(name: str, known: Sequence[str]) -> str:
    """What an unknown flag stands for, as the rest of a sentence; empty where nobody knows."""
    if (elsewhere := PUBLISHED_ELSEWHERE.get(name.partition(".")[0])) is not None:
        flags = re.findall(r"--(\w+)", elsewhere)
        return f": {elsewhere}{'' if not flags or {*flags} & {*known} else ', of another command'}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=_SAME_WORD)
    return f"; did you mean --{near[0]}?" if near else ""


def _optional(config_class: type[Any]) -> set[str]:
    """Names of the fields that may be None."""
    return {name for name, kind in typing.get_type_hints(config_class).items() if NoneType in typing.get_args(kind)}


def _with_null(words: Sequence[str], optional: set[str]) -> list[str]:
    """`None`, as Python's programs write it, is `null` to draccus; a string flag would else be named "None"."""
    found = list(words)
    for place, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in optional:
            continue
        if equals and value == "None":
            found[place] = f"--{name}=null"
        elif not equals and words[place + 1 : place + 2] == ["None"]:
            found[place + 1] = "null"
    return found


def parse_or_exit(config_class: type[Config]) -> Config:
    """As `parse_flags` for this process; ends it with one line and its status where that raises."""
    try:
        return parse_flags(config_class)
    except FlagError as error:
        if speaks_for_node():
            print_error(named_by_node(str(error)))
        sys.exit(UNUSABLE)


def speaks_for_node() -> bool:
    """Whether this process tells what its machine finds: of torchrun's processes the first on every node."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def several_nodes() -> bool:
    """Whether torchrun's processes run on several machines."""
    world = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world) != world


def named_by_node(message: str) -> str:
    """The message, with the name of this machine where there are several."""
    return f"on node {socket.gethostname()}: {message}" if several_nodes() else message
