"""Services that a run is told to: what each needs, and how a run that goes on finds itself there again."""

import importlib.util
import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismatic.atomic_files import write_atomically
from prismatic.pictures.images import Picture
from prismatic.stored_files import read_json
from prismatic.training.config import FinetuneConfig
from prismatic.training.runs.files import TRACKER_FILE
from prismatic.training.telling.values import flat
from prismatic.training.wandb_account import check_wandb

log = logging.getLogger(__name__)

TRACKERS = ("wandb", "trackio", "none")


def check_tracker(config: FinetuneConfig) -> None:
    """What `--tracker` and `--use_wandb` ask for can be done in the process that logs.

    Raises ValueError for a tracker that is not known or not installed, for flags that contradict each other, and as
    `check_wandb`.
    """
    if config.tracker not in (None, *TRACKERS):
        raise ValueError(f"--tracker {config.tracker!r} is unknown; choose one of {', '.join(TRACKERS)}")
    if config.use_wandb and config.tracker not in (None, "wandb"):
        raise ValueError(f"--use_wandb True with --tracker {config.tracker}; leave one of them out")
    if config.tracking == "wandb":
        check_wandb("--use_wandb True" if config.use_wandb else "--tracker wandb")
    if config.tracking == "trackio" and importlib.util.find_spec("trackio") is None:
        raise ValueError("--tracker trackio needs trackio, which is not installed: pip install trackio")


def kept_id(run: Path, resume_step: int) -> str:
    """The run's id at Weights & Biases: that of `tracker.json` where it goes on, else a new one, which is put there."""
    file = run / TRACKER_FILE
    if resume_step and file.is_file():
        try:
            return str(read_json(file)["wandb"])
        except (ValueError, TypeError, KeyError):
            log.warning("%s does not hold the run's id, so the tracker gets a new run", file)
    made = uuid.uuid4().hex[:12]
    write_atomically(file, json.dumps({"wandb": made}) + "\n")
    return made


class Tracker:
    """What the two services have in common: a run that takes numbers and pictures of a step."""

    _run: Any
    _image: Any

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step."""
        self._run.log(flat(values), step=step)

    def write_picture(self, step: int, name: str, picture: Picture) -> None:
        """Log the picture, uint8 (H, W, 3), of one step."""
        self._run.log({name: self._image(picture)}, step=step)

    def rewind(self, step: int) -> None:
        """Nothing: wandb leaves out what is told until the run is past where it was, trackio keeps both."""

    def close(self) -> None:
        """Finish the run; waits until all is written."""
        self._run.finish()


class Wandb(Tracker):
    """Weights & Biases."""

    def __init__(self, config: FinetuneConfig, resume_step: int = 0) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            entity=config.wandb_entity,
            project=config.wandb_project,
            name=config.run_id,
            id=kept_id(config.run_dir, resume_step),
            resume="allow",
            dir=str(config.run_dir),
            config=_told(config),
        )


class Trackio(Tracker):
    """Trackio: a database on this machine, or a Space of Hugging Face's (TRACKIO_SPACE_ID)."""

    def __init__(self, config: FinetuneConfig, resume_step: int = 0) -> None:
        import trackio

        self._image = trackio.Image
        self._run = trackio.init(
            project=config.wandb_project,
            name=config.run_id,
            config=_told(config),
            resume="allow" if resume_step else "never",
            embed=False,
        )


def _told(config: FinetuneConfig) -> dict[str, str]:
    return {name: str(value) for name, value in vars(config).items()}
