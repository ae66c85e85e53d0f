"""The list of a checkpoint's files and their sizes, by which a whole one is told from one that was copied in part."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prismatic.atomic_files import write_atomically
from prismatic.stored_files import read_json

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What was known when a checkpoint was written.

    Attributes:
        step: finished optimiser steps, or "latest".
        files: path below the checkpoint -> size in bytes.
        facts: plain data from whoever wrote it (the validation loss, say).
    """

    step: int | str
    files: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_manifest(folder: Path, step: int | str, facts: Mapping[str, Any] | None = None) -> Manifest:
    """List all files that `folder` holds now; to be called when everything else is written."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE and not path.name.startswith(".")
    }
    return _write(folder, Manifest(step, files, dict(facts or {})))


def list_again(folder: Path, gone: Mapping[str, int] | set[str], new: Mapping[str, int]) -> None:
    """Take files out of the manifest, and put files in; nothing where there is none."""
    if (manifest := read_manifest(folder)) is not None:
        kept = {name: size for name, size in manifest.files.items() if name not in gone}
        _write(folder, replace(manifest, files=kept | dict(new)))


def _write(folder: Path, manifest: Manifest) -> Manifest:
    write_atomically(folder / MANIFEST_FILE, json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def read_manifest(directory: Path) -> Manifest | None:
    """None where there is none, as in published checkpoints. Raises ValueError for what is no manifest."""
    file = directory / MANIFEST_FILE
    if not file.is_file():
        return None
    content = read_json(file)
    files, step = content.get("files"), content.get("step")
    if not isinstance(files, dict) or not all(isinstance(size, int) for size in files.values()) or step is None:
        raise ValueError(f"{file} is no list of a checkpoint's files; copy the checkpoint again")
    return Manifest(step, files, content.get("facts") or {})


def manifest_problems(directory: Path) -> list[str]:
    """What is missing or has another size than listed, a sentence each; empty for a whole checkpoint."""
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        return [str(error)]
    if manifest is None:
        return [f"{directory} has no {MANIFEST_FILE}, so nothing says whether it is whole"]
    problems = []
    for name, size in manifest.files.items():
        file = directory / name
        if not file.is_file():
            problems.append(f"{name} is missing, which {MANIFEST_FILE} lists; copy the checkpoint again")
        elif (found := file.stat().st_size) != size and not _edited(file):
            problems.append(f"{name} has {found} bytes, {MANIFEST_FILE} says {size}; copy the checkpoint again")
    return problems


def _edited(file: Path) -> bool:
    """Whether it is a settings file that is whole, only not as it was: people change those by hand."""
    try:
        return file.suffix == ".json" and bool(read_json(file))
    except ValueError:
        return False


def is_complete(directory: Path) -> bool:
    """Whether there is a manifest, and every file that it lists, in its size (JSON: readable)."""
    return not manifest_problems(directory)
