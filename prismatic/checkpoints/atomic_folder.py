"""Folders that appear whole: written beside their place under a hidden name, put on the disk, then renamed once.

Nothing is ever replaced, so a reader needs no lock and never has to repair anything: what has its final name is
complete. A killed process leaves a hidden folder, which `remove_leftovers` removes.
"""

import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from prismatic.atomic_files import sync
from prismatic.stored_files import make_readable

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-(?P<started>\d+)@(?P<host>[^@]+)\.saving")
_LONGEST_NAME = 100
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Within the block a hidden folder to write to; afterwards it is `directory`, with every byte on the disk.

    Where the block raises, nothing of it stays.

    Raises:
        FileExistsError: for a `directory` that holds anything, before the block or, if somebody else was quicker,
            behind it.
        OSError: where the disk is full, or the parent folder cannot be written to.
    """
    directory = directory.resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise _exists(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(directory.parent, directory.name) as staging:
        yield staging
        settle(staging)
        try:
            os.rename(staging, directory)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise _exists(directory) from error
            raise
        sync(directory.parent)


def _exists(directory: Path) -> FileExistsError:
    return FileExistsError(f"{directory} exists and is not empty; remove it, or give a new folder")


@contextmanager
def staging_folder(parent: Path, name: str) -> Iterator[Path]:
    """Within the block a hidden folder in `parent` that says who writes it; afterwards it is gone.

    Raises OSError with a remedy where the disk is full.
    """
    # Names of runs can be long, and a file system takes 255 bytes.
    writer = f"{os.getpid()}-{_started(os.getpid())}@{socket.gethostname()}"
    staging = parent / f".{name[:_LONGEST_NAME]}.{writer}.saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    except OSError as error:
        if error.errno in _FULL:
            words = f"the disk is full, so {name} was not written; free some space there or choose another disk"
            raise OSError(error.errno, words, str(parent)) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def reading(directory: Path) -> Iterator[bool]:
    """Within the block nobody on this file system removes the folder by `remove_unless_read`; nothing is written.

    Whether the folder is (still) there is what the block gets.
    """
    with _locked(directory, fcntl.LOCK_SH):
        yield directory.is_dir()


def remove_unless_read(folder: Path) -> bool:
    """Remove a folder, its name first, so that half of one is never taken for one. False where somebody reads it."""
    with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
        if not alone:
            return False
        doomed = folder.with_name(f".removed-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    return True


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """False where another process's lock is in the way; where a file system has no locks nothing is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
    finally:
        os.close(descriptor)


def settle(folder: Path) -> None:
    """Make everything in a folder readable for whom new files are, and put it on the disk."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    make_readable(folder, files)
    for path in (*files, *(path for path in paths if path.is_dir()), folder):
        sync(path)


def remove_leftovers(parent: Path, pattern: str = "*", of_all_hosts: bool = False) -> list[Path]:
    """Remove what writers that are dead left in `parent`; returns what was removed.

    Args:
        parent: folder of checkpoints; need not exist.
        pattern: of the names that the folders were to have (`*_chkpt`).
        of_all_hosts: also what processes of other machines left, which nobody here can tell to be dead: for callers
            that know that nobody else writes there now, as the holder of a lock does. Processes of this machine keep
            theirs while they live.
    """
    removed = []
    for folder in sorted(parent.glob(".*.saving")):
        match = _LEFTOVER.fullmatch(folder.name)
        if match is None or not fnmatch(match["name"], pattern):
            continue
        pid, here = int(match["pid"]), match["host"] == socket.gethostname()
        alive = _started(pid) == int(match["started"]) if here else not of_all_hosts
        if not alive:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the machine did, so that a number used again is not taken for it.

    0 for a living one where the system does not say; None where there is no such process.
    """
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's
        pass
    return 0
