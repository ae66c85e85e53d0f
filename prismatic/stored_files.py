"""Files of a checkpoint: the small ones read so that what is wrong is said in one sentence, and modes of all."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what reads JSON alone need not wait for torch
    import torch

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PLACEHOLDER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"


def refuse_placeholder(file: Path) -> None:
    """Raises ValueError for the few lines that stand for a file where git-lfs has not fetched it."""
    with file.open("rb") as stream:
        if stream.read(len(_PLACEHOLDER)) == _PLACEHOLDER:
            raise ValueError(f"{file} is a placeholder that git-lfs left; run `git lfs pull`, or download it again")


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file, with or without a byte order mark at its start.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a placeholder of git-lfs, what is no JSON, and JSON that is no object.
    """
    refuse_placeholder(file)
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a JSON object; copy or download it again")
    return content


def load_plain(file: Path) -> Any:
    """What `torch.save` wrote: tensors, mapped into memory where they can be, in plain Python data. Runs no code.

    Raises ValueError for a placeholder of git-lfs, a file that is cut off, and one that holds other Python objects.
    """
    import torch

    refuse_placeholder(file)
    with file.open("rb") as stream:
        mapped = stream.read(len(_ZIP)) == _ZIP  # the format before torch 1.6 cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what it refuses afterwards
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if re.search("Unsupported (global|class)", str(error)):
            raise ValueError(
                f"{file} holds pickled Python objects, which may run code and are not loaded; save the state_dict() "
                "alone"
            ) from error
        raise _cut_off(file) from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, struct.error) as error:
        raise _cut_off(file) from error


def _cut_off(file: Path) -> ValueError:
    size = file.stat().st_size
    return ValueError(f"{file} is cut off, or torch.save did not write it ({size} bytes); copy or download it again")


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a `.pt` file. Raises ValueError as `load_plain`, and for a file that holds something else."""
    import torch

    state = load_plain(file)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{file} holds no state dict (name -> tensor); save the state_dict() alone")
    return dict(state)


def component_name(component: str = "*", step: int | str = "*") -> str:
    """Of the file that holds a head or projector beside a checkpoint's weights; with `*` a pattern for several."""
    return f"{component}--{step}_checkpoint.pt"


def component_files(directory: Path, component: str = "*") -> list[Path]:
    """The files of a component, or of all, sorted."""
    return sorted(directory.glob(component_name(component)))


def component_file(directory: Path, component: str) -> Path | None:
    """The one file of a component, None where there is none.

    Raises ValueError where there are several, since nothing says which belongs to the weights.
    """
    found = component_files(directory, component)
    if len(found) > 1:
        raise ValueError(
            f"{directory} holds {len(found)} {component} files ({', '.join(f.name for f in found)}); keep one"
        )
    return found[0] if found else None


def load_component(file: Path) -> dict[str, torch.Tensor]:
    """State dict of a `.pt` component, without the `module.` prefix that distributed training leaves.

    Raises ValueError as `load_tensors`, and for tensors of whole numbers.
    """
    state = {name.removeprefix("module."): value for name, value in load_tensors(file).items()}
    if odd := [name for name, value in state.items() if not value.is_floating_point()]:
        raise ValueError(
            f"{file}: {odd[0]!r} holds {str(state[odd[0]].dtype).removeprefix('torch.')}, where weights are "
            "floating-point numbers; save the state_dict() again"
        )
    return state


def foreign_code_only(settings: Mapping[str, Any]) -> dict[str, Any]:
    """JSON settings for a new folder: `auto_map` keeps what names a repository (`user/name--module.Class`).

    The other entries name Python files beside the JSON, which are neither needed nor copied.
    """
    kept = dict(settings)
    if isinstance(auto_map := kept.pop("auto_map", None), Mapping):
        foreign = {key: value for key, value in auto_map.items() if "--" in json.dumps(value)}
        kept |= {"auto_map": foreign} if foreign else {}
    return kept


def make_readable(folder: Path, files: Iterable[Path]) -> None:
    """Give files the mode that a new file has in `folder`: safetensors writes them for their owner alone."""
    probe = folder / f".mode-{os.getpid()}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in files:
        if file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)
