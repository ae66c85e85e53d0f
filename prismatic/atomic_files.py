"""Replacing single files so that readers, and whoever comes after a killed process or machine, see the old or the new.

For folders of files that belong together there is `prismatic.checkpoints.atomic_folder`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Within the block a path to write to, in the folder of `path`, which is made; afterwards it takes its place.

    Where the block raises, nothing of it stays. Processes that write the same file at once do not meet: the last wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk: what is renamed afterwards outlives a power cut."""
    if path.is_dir():
        with suppress(OSError):  # some network file systems, and Windows, cannot do that for a folder
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write text (as UTF-8) or bytes; returns the path."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)
