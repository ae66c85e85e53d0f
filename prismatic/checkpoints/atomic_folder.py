"""Replacing parts of a folder so that a killed process leaves the old state or the new one.

New files are written to a staging folder beside the target. One rename of it, to `.pending` with a manifest, is the
moment the new state exists; whoever reads the folder next finishes moving the files.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prismatic.stored_files import component_name, make_readable

PENDING = ".pending"
MANIFEST = "manifest.json"
REPLACED = (component_name(), "model*.safetensors*", "lora_adapter")
"""What a new checkpoint replaces altogether; other files of the folder stay."""
WEIGHTS_REPLACED = ("model*.safetensors*",)
"""What new weights alone replace."""


def new_staging(directory: Path) -> Path:
    """An empty folder beside `directory` for the files of one `commit`; what an earlier one left there is removed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.parent / f".{directory.name}.saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def commit(staging: Path, directory: Path, replaced: Sequence[str] = REPLACED) -> None:
    """Put a complete staging folder in place.

    Args:
        staging: from `new_staging`; gone afterwards.
        directory: may hold an older state and other files, which stay.
        replaced: patterns of files and folders of the older state that go, unless the staging folder brings them anew.
    """
    make_readable(staging, [file for file in staging.rglob("*") if file.is_file()])
    if not directory.exists():
        os.replace(staging, directory)
        return
    finish_pending(directory)
    files = sorted(file.name for file in staging.iterdir())
    (staging / MANIFEST).write_text(json.dumps({"files": files, "replaced": list(replaced)}))
    os.replace(staging, directory / PENDING)
    finish_pending(directory)


@contextmanager
def staged(directory: Path, replaced: Sequence[str] = REPLACED) -> Iterator[Path]:
    """Within the block an empty folder to write to; its files are committed to `directory` unless the block raises."""
    staging = new_staging(directory)
    try:
        yield staging
        commit(staging, directory, replaced)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def finish_pending(directory: Path) -> None:
    """Move the files of an interrupted `commit` into place: what lies in `.pending` is complete.

    Several processes may do this at once.
    """
    pending = directory / PENDING
    try:
        manifest = json.loads((pending / MANIFEST).read_text())
    except FileNotFoundError:
        shutil.rmtree(pending, ignore_errors=True)  # everything was moved before
        return
    if isinstance(manifest, list):  # written by a version in which there were only whole checkpoints
        manifest = {"files": manifest, "replaced": REPLACED}
    new = set(manifest["files"])
    for pattern in manifest["replaced"]:
        for old in directory.glob(pattern):
            if old.name not in new:
                _remove(old)
    for name in sorted(new):
        with suppress(FileNotFoundError):  # moved already
            target = directory / name
            if target.is_dir() and (pending / name).is_dir():
                _remove(target)
            os.replace(pending / name, target)
    shutil.rmtree(pending, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
