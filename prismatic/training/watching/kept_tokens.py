"""Watching what the pruner learns: every so many steps, what it keeps of a few fixed frames."""

import logging
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prismatic.models.batch import Call
from prismatic.pictures.learning import Viewpoint
from prismatic.training.step import to_device
from prismatic.training.watching.current_policy import averaged
from prismatic.training.watching.fixed_frames import WatchedFrame, read_frames
from prismatic.training.watching.pictures_folder import PicturesFolder
from prismatic.vla.datasets.collate import collate

if TYPE_CHECKING:
    from prismatic.training.build import Run
    from prismatic.training.logging import RunLog

log = logging.getLogger(__name__)

NAME = "kept_tokens"
"""Of the pictures in TensorBoard and wandb."""


class KeptTokens:
    """Asks the model of a run what it keeps, and draws that. Every process makes one; the main process draws."""

    def __init__(self, run: "Run", run_log: "RunLog") -> None:
        self._run = run
        self._log = run_log
        self._frames = read_frames(run.val_data or run.train_data, run.config.picture_frames) if _wanted(run) else []
        self._folder = _folder(run, self._frames) if self._frames and run.ranks.is_main else None

    def rewind(self, step: int) -> None:
        """Go on as if behind finished step `step`: later pictures are dropped."""
        if self._folder is not None:
            try:
                self._folder.rewind(step)
            except (OSError, RuntimeError, ImportError, ValueError) as error:
                _warn(error)

    def is_due(self, step: int) -> bool:
        """Whether there is a picture of finished step `step`: the first and the last have one, too."""
        config = self._run.config
        return bool(self._frames) and (step % config.picture_freq == 0 or step == config.max_steps)

    def draw(self, step: int) -> None:
        """Compute what is kept after finished step `step`, in all processes, and draw it in the main one.

        What cannot be written is told in the log: no run ends over its pictures.
        """
        kept = self.kept()
        if self._folder is not None:
            try:
                picture = self._folder.add(step, kept, last=step == self._run.config.max_steps)
                self._log.picture(step, NAME, picture)
            except (OSError, RuntimeError, ImportError, ValueError) as error:
                _warn(error)

    def kept(self) -> NDArray[np.bool_]:
        """(F, V): the visual tokens of each frame that stay, as inference computes, with the averaged weights.

        Every process must call it: where weights are spread over processes, one alone cannot compute.
        """
        run, found = self._run, []
        with averaged(run):
            for first in range(0, len(self._frames), run.config.batch_size):
                frames = self._frames[first : first + run.config.batch_size]
                batch = collate([frame.sample for frame in frames], run.train_data.pad_token_id)
                call = Call(seeds=list(range(first, first + len(frames))))
                _, selection = run.module.predict(to_device(batch, run.ranks.device), call)
                found.append(selection.kept().cpu().numpy())
        return np.concatenate(found)


def _wanted(run: "Run") -> bool:
    """Whether there is anything to see, and the run is long enough for two pictures."""
    config = run.config
    drops = run.training.checkpoint.model.config.pruner_spec.name != "none"
    return drops and 0 < config.picture_freq <= config.max_steps


def _folder(run: "Run", frames: list[WatchedFrame]) -> PicturesFolder:
    model = run.training.checkpoint.model
    cameras = model.robot.cameras[: model.num_images_in_input]
    return PicturesFolder(run.config.run_dir, frames, Viewpoint(cameras, run.config.image_aug))


def _warn(error: Exception) -> None:
    log.warning("pictures of what is kept are missing or old: %s", error)
