"""Flags of the commands: fields of a dataclass, read by draccus, with errors that one can act on."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import draccus
from draccus.utils import DraccusException

Config = TypeVar("Config")


class FlagError(ValueError):
    """The command line cannot be read."""


def parse_flags(config_class: type[Config], words: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for; `~` at the start of a path is the home folder.

    Args:
        config_class: a dataclass; its fields are the flags.
        words: None: those of this process.

    Raises:
        FlagError: for an unknown flag, one without a value, a value of another type, or a `--config_path` that cannot
            be read.
    """
    words = list(sys.argv[1:] if words is None else words)
    known = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        name, has_value, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name == "help":
            continue
        if name.partition(".")[0] not in (*known, "config_path"):
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean --{near[0]}?" if near else ""
            raise FlagError(f"unknown flag --{name}{meant} (--help lists all)")
        if not has_value and following.startswith("--"):
            raise FlagError(f"--{name} has no value; give one after it, such as True or a number (--help lists all)")
    try:
        config = draccus.parse(config_class, args=words)
        find_home(config)
    except (DraccusException, OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder is known
        raise FlagError(str(error).strip()) from error
    return config


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


def parse_or_exit(config_class: type[Config]) -> Config:
    """As `parse_flags` for this process; ends it with status 2 and one line where that raises."""
    try:
        return parse_flags(config_class)
    except FlagError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
