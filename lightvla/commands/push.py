"""Upload a checkpoint to the Hugging Face hub, with a model card that says how it did and how to repeat that.

    lightvla push runs/my-run--10000_chkpt user/name --results rollouts/results.json --dry_run upload
    lightvla push runs/my-run--10000_chkpt user/name --results rollouts/results.json

`--dry_run DIR` writes exactly the folder that would be uploaded, and uploads nothing. What resuming needs (training
state, adapter) and logs stay here. Uploading takes the login of `hf auth login`. Ends with 0, or 2
when it cannot be done.
"""

import argparse
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from experiments.robot.libero.reports.model_card import model_card
from experiments.robot.libero.results.results import Results
from lightvla.flags import push_parser
from prismatic.checkpoints.files import (
    PROCESSOR_FILES,
    STATISTICS_FILE,
    check_complete,
    copy_small_files,
)
from prismatic.checkpoints.inspection import inspect_checkpoint
from prismatic.checkpoints.places import stands_for
from prismatic.checkpoints.weight_files import INDEX_FILE
from prismatic.command_status import UNUSABLE, print_error
from prismatic.stored_files import component_files

log = logging.getLogger("push_to_hub")

CARD_FILE = "README.md"
LINKED_FROM_BYTES = 16 << 20
"""Files of this size are linked into the folder where the file system can, instead of copied."""


SMALL_FILES = ("config.json", STATISTICS_FILE, INDEX_FILE, *PROCESSOR_FILES)
"""What is uploaded beside weights and heads."""


def large_files(checkpoint: Path) -> list[Path]:
    """Weights and heads."""
    return [*check_complete(checkpoint), *component_files(checkpoint)]


def prepare(checkpoint: Path, repo_id: str, results: Sequence[Path], license_id: str, folder: Path) -> Path:
    """Write the folder to upload; returns it.

    Raises:
        FileNotFoundError: naming what is not there.
        ValueError: for a checkpoint that something is wrong with, results of another kind, or an unusable repo_id.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"{repo_id!r} names no repository on the hub; give user/name")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    found = inspect_checkpoint(checkpoint)
    if found.problems:
        raise ValueError(f"{checkpoint} is not fit to be uploaded: {'; '.join(found.problems)}")
    loaded = {path: Results.load(path) for path in results}
    for path, result in loaded.items():
        evaluated = Path(str(result.policy.get("checkpoint", "")))
        if stands_for(evaluated).resolve() != checkpoint.resolve():
            log.warning("%s is of checkpoint %s, not %s: is it the same model?", path, evaluated, checkpoint)
    card = model_card(repo_id, found, list(loaded.values()), license_id)
    folder.mkdir(parents=True, exist_ok=True)
    copy_small_files(checkpoint, folder, SMALL_FILES)
    for file in large_files(checkpoint):
        _place(file, folder / file.name)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    return folder


def _place(source: Path, target: Path) -> None:
    if source.stat().st_size >= LINKED_FROM_BYTES:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Create the repository where it does not exist and upload the folder as one commit; returns its address."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload checkpoint").commit_url)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    return _push(push_parser().parse_args(arguments))


def _push(flags: argparse.Namespace) -> int:
    checkpoint = stands_for(flags.checkpoint)
    try:
        if flags.dry_run is not None:
            folder = prepare(checkpoint, flags.repo_id, flags.results, flags.license, flags.dry_run)
            log.info("nothing was uploaded; what would be lies in %s", folder)
            return 0
        with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".upload-") as scratch:
            folder = prepare(checkpoint, flags.repo_id, flags.results, flags.license, Path(scratch) / "folder")
            log.info("uploaded: %s", upload(folder, flags.repo_id, flags.private))
    except (ValueError, OSError, HfHubHTTPError) as error:
        print_error(error)
        return UNUSABLE
    return 0


def command(flags: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    return _push(flags)
