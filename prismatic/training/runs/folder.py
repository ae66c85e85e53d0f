"""The folder of a run: its checkpoints, the pointers to the newest and the best one, and whose run it is.

    runs/RUN/
      run.json  finetune.yaml  metrics.jsonl  report.html  tensorboard/
      checkpoints/
        RUN--1000_chkpt/  RUN--2000_chkpt/      whole when they have their names
        latest -> RUN--2000_chkpt               replaced by one rename
        best -> RUN--1000_chkpt                 with --keep_best

Earlier versions put checkpoints beside the run folder, and `latest` ones into it; those are found, too.
"""

import fcntl
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prismatic.checkpoints.atomic_folder import remove_leftovers, remove_unless_read
from prismatic.checkpoints.manifest import manifest_problems, read_manifest
from prismatic.checkpoints.places import BEST, CHECKPOINTS, LATEST, checkpoint_name
from prismatic.checkpoints.saving import load_training_state
from prismatic.training.runs.files import LOCK_FILE

log = logging.getLogger(__name__)

LOCK_PATIENCE_S = 60.0
"""How long a run waits for another process that still holds it: one that is ending saves first."""


class RunFolder:
    """What lies in the folder of a run.

    Args:
        path: of the run; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / CHECKPOINTS

    def checkpoint_dir(self, step: int) -> Path:
        """Where the checkpoint of finished step `step` goes."""
        return self.checkpoints / checkpoint_name(self.path.name, step)

    def saved(self) -> dict[int, Path]:
        """The whole checkpoints of the run, by step, oldest first. One that lacks files is named in the log."""
        found: dict[int, Path] = {}
        beside = re.compile(re.escape(self.path.name) + r"--(\d+)_chkpt")
        inside = re.compile(r".+--(\d+)_chkpt")  # the run's folder may have been renamed
        for parent, pattern in ((self.path.parent, beside), (self.checkpoints, inside)):
            for folder in parent.glob("*_chkpt"):
                match = pattern.fullmatch(folder.name)
                if not match or not (folder / "training_state").is_dir():
                    continue
                if folder.parent == self.checkpoints and (problems := manifest_problems(folder)):
                    log.warning("%s is left out: %s", folder, problems[0])
                    continue
                found[int(match.group(1))] = folder
        if (self.path / "training_state").is_dir():  # an earlier version's latest-only checkpoint
            found.setdefault(load_training_state(self.path)["step"], self.path)
        return {step: found[step] for step in sorted(found)}

    def newest_state(self, step: int | None = None) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose training state can be read, or that of `step`; None where there is none.

        Raises FileNotFoundError where there is none of that step; names those that there are.
        """
        saved = self.saved()
        if step is not None and step not in saved:
            there = ", ".join(map(str, saved)) or "none"
            raise FileNotFoundError(f"--resume {step}: the run in {self.path} has no checkpoint of that step ({there})")
        for folder in reversed(list(saved.values())) if step is None else [saved[step]]:
            try:
                return folder, load_training_state(folder)
            except (ValueError, OSError) as error:
                if step is not None:
                    raise
                log.warning("%s is left out: %s", folder, error)
        return None

    def point(self, name: str, folder: Path) -> None:
        """Make the pointer `name` (`latest`, `best`) lead to a checkpoint; a reader sees the old or the new one."""
        partial = self.checkpoints / f".{name}.{os.getpid()}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(os.path.relpath(folder, self.checkpoints))
        if not (self.checkpoints / name).is_symlink():
            self.set_aside(self.checkpoints / name)  # a copy that was made in its place, as `cp -L` does
        os.replace(partial, self.checkpoints / name)

    def best(self) -> Path | None:
        """The checkpoint with the lowest recorded validation loss, the earliest of equal ones."""
        losses = [
            (loss, step, folder)
            for step, folder in self.saved().items()
            if (loss := _validation_loss(folder)) is not None
        ]
        return min(losses)[2] if losses else None

    def make_room(self, keep_last: int, keep_best: bool) -> None:
        """Remove checkpoints before the next one is written, so that afterwards `keep_last` are older than it.

        The one before the newest thus stays for a while, and one that is being loaded as long as that takes.
        Checkpoints of earlier versions, outside `checkpoints/`, are left alone.
        """
        if keep_last <= 0:
            return
        own = [folder for folder in self.saved().values() if folder.parent == self.checkpoints]
        best = self.best() if keep_best else None
        for folder in own[:-keep_last]:
            if folder != best:
                removed = remove_unless_read(folder)
                what = "is removed" if removed else "is being read, and removed later"
                log.info("--keep_last %d: %s %s", keep_last, folder.name, what)

    def set_aside(self, folder: Path) -> None:
        """Move a checkpoint, or what is in its place, to `checkpoints/superseded`; nothing where nothing is there."""
        if not folder.exists():
            return
        aside = self.checkpoints / "superseded"
        aside.mkdir(parents=True, exist_ok=True)  # earlier versions made no `checkpoints/`
        target = aside / folder.name
        os.rename(folder, target if not target.exists() else aside / f"{folder.name}.{time.time_ns()}")
        log.info("%s is superseded and now in %s", folder, aside)

    def go_back_to(self, step: int) -> None:
        """Set checkpoints of later steps aside: a run goes on from before them."""
        saved = self.saved()
        for later, folder in saved.items():
            if later > step and folder != self.path:
                self.set_aside(folder)
        if step in saved and saved[step].parent == self.checkpoints:
            self.point(LATEST, saved[step])
        pointer = self.checkpoints / BEST
        if pointer.is_symlink() and not pointer.exists():  # the best one was set aside
            if (best := self.best()) is None:
                pointer.unlink()
            else:
                self.point(BEST, best)

    def clear_leftovers(self) -> None:
        """Remove what processes that were killed left half written."""
        if self.checkpoints.is_dir():
            remove_leftovers(self.checkpoints, of_all_hosts=True)
            for folder in self.checkpoints.glob(".removed-*"):
                shutil.rmtree(folder, ignore_errors=True)
            for name in (LATEST, BEST):
                for pointer in self.checkpoints.glob(f".{name}.*"):
                    pointer.unlink()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block no other process on this file system trains this run.

        Raises ValueError where one still does after a minute. A process that dies lets go.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK_FILE).open("a+") as lock:
            _take(lock.fileno(), self.path)
            lock.seek(0)
            lock.truncate()
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            try:
                yield
            finally:  # closing is not enough: processes that load data have the file, too
                fcntl.flock(lock.fileno(), fcntl.LOCK_UN)


def _take(lock: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            who = (path / LOCK_FILE).read_text().strip() or "another process"
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{who} is training the run in {path}; wait for it, or begin another run by --run_id_note or "
                    "--run_id_override"
                ) from None
            if not told:
                log.warning("%s still holds the run in %s; waiting for it", who, path)
                told = True
            time.sleep(0.5)
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no second process on this run", path, error.strerror)
            return


def _validation_loss(folder: Path) -> float | None:
    manifest = read_manifest(folder)
    return None if manifest is None else manifest.facts.get("validation_loss")
