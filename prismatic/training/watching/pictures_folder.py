"""`pictures/` of a run: a picture per look at the fixed frames, all of them as a video, one frame as a strip."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prismatic.atomic_files import replacing, write_atomically
from prismatic.pictures.images import Picture
from prismatic.pictures.learning import Viewpoint, counts_per_image, kept_picture, padded, strip
from prismatic.pictures.video import write_mp4
from prismatic.training.watching.fixed_frames import WatchedFrame

log = logging.getLogger(__name__)

FOLDER = "pictures"
INDEX_FILE = "pictures.json"
STRIP_FILE = "strip.webp"
VIDEO_FILE = "kept.mp4"
STRIP_STEPS = 10
"""So many steps stand side by side in the strip: of more the patches are too small where it is shown."""
VIDEO_SECONDS = 15.0
"""A video of many pictures lasts about so long."""
FRAME_RATES = (2.0, 12.0)
HOLD_S = 1.5
"""The last picture of the video stays that long."""
VIDEO_SHARE = 0.02
"""Of the time of a run, at most that is spent on making the video again and again."""


@dataclass(frozen=True)
class Look:
    """What was kept of the fixed frames after one step.

    Attributes:
        step: finished steps of training.
        file: of the picture, relative to the folder.
        frames: which frames they are (`WatchedFrame.identity`).
        kept: (F, V), the visual tokens of each that stayed.
        tokens_kept: how many those are, per frame and image.
    """

    step: int
    file: str
    frames: list[dict[str, Any]]
    kept: NDArray[np.bool_]
    tokens_kept: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        """As `pictures.json` holds it; a mask is hexadecimal, eight tokens to a byte."""
        masks = [np.packbits(mask).tobytes().hex() for mask in self.kept]
        return {**vars(self), "kept": masks, "visual_tokens": self.kept.shape[1]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Look":
        """What `to_json` made. Raises KeyError, TypeError or ValueError for anything else."""
        content = dict(content)
        number = int(content.pop("visual_tokens"))
        masks = [np.frombuffer(bytes.fromhex(mask), np.uint8) for mask in content.pop("kept")]
        kept = np.array([np.unpackbits(mask, count=number) for mask in masks], dtype=bool)
        return cls(**content, kept=kept)


class PicturesFolder:
    """The pictures of a run, in order of their steps. One process writes them.

    Methods raise OSError where something cannot be written; what was there before then stays whole.
    """

    def __init__(self, run_dir: Path, frames: Sequence[WatchedFrame], view: Viewpoint) -> None:
        """Args:
        run_dir: the run's folder.
        frames: those that are looked at from here on, at least one.
        view: how.
        """
        self.path = run_dir / FOLDER
        self._frames = frames
        self._view = view
        self._looks = _read(self.path / INDEX_FILE)
        self._next_video = 0.0

    def rewind(self, step: int) -> None:
        """Drop the pictures behind `step`, whose successors are drawn again."""
        before = len(self._looks)
        self._looks = [look for look in self._looks if look.step <= step]
        if self.path.is_dir():
            write_atomically(self.path / INDEX_FILE, json.dumps([look.to_json() for look in self._looks]))
            for file in (self.path / "kept").glob("step_*.webp"):
                if (number := file.stem.removeprefix("step_")).isdecimal() and int(number) > step:
                    file.unlink()
        if len(self._looks) < before:
            for name in (STRIP_FILE, VIDEO_FILE):
                (self.path / name).unlink(missing_ok=True)
            if self._looks:
                self._draw_together(video=True)

    def add(self, step: int, kept: NDArray[np.bool_], last: bool) -> Picture:
        """Draw what was kept, (F, V), after a step; returns the picture. The video is made again at the `last` one,
        and before it where that is cheap."""
        picture = kept_picture([frame.shown for frame in self._frames], kept, step, self._view)
        file = f"kept/step_{step:08d}.webp"
        _save(picture, self.path / file)
        counts = [counts_per_image(mask, len(self._view.cameras)) for mask in kept]
        look = Look(step, file, [frame.identity() for frame in self._frames], kept, counts)
        self._looks = [*(old for old in self._looks if old.step < step), look]
        write_atomically(self.path / INDEX_FILE, json.dumps([look.to_json() for look in self._looks]))
        self._draw_together(last or time.monotonic() >= self._next_video)
        return picture

    def _draw_together(self, video: bool) -> None:
        middle = len(self._frames) // 2
        frame = self._frames[middle]
        same = [look for look in self._looks if frame.identity() in look.frames]
        if same:
            masks = np.stack([look.kept[look.frames.index(frame.identity())] for look in same])
            picture = strip(frame.shown, masks, [look.step for look in same], self._view, STRIP_STEPS)
            _save(picture, self.path / STRIP_FILE)
        if video:
            began = time.monotonic()
            self._write_video()
            self._next_video = time.monotonic() + (time.monotonic() - began) / VIDEO_SHARE

    def _write_video(self) -> None:
        files = [self.path / look.file for look in self._looks]
        rate = float(np.clip(len(files) / VIDEO_SECONDS, *FRAME_RATES))
        write_mp4(self.path / VIDEO_FILE, _frames(files, round(HOLD_S * rate)), rate)


def _read(file: Path) -> list[Look]:
    """The looks that an index names; none where there is no index, or one that says nothing."""
    try:
        looks = [Look.from_json(content) for content in json.loads(file.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read (%s); pictures of earlier steps are left out", file, error)
        return []
    return sorted(looks, key=lambda look: look.step)


def _save(picture: Picture, file: Path) -> None:
    with replacing(file) as partial:
        Image.fromarray(picture).save(partial, format="WEBP", quality=85)


def _frames(files: Sequence[Path], hold: int) -> Iterator[Picture]:
    """The pictures in the size of the largest, one at a time; the last one stays."""
    sizes = []
    for file in files:
        with Image.open(file) as picture:
            sizes.append(picture.size)
    width, height = (max(sides) for sides in zip(*sizes, strict=True))
    for file in files:
        with Image.open(file) as picture:
            frame = padded(np.asarray(picture.convert("RGB")), height, width)
        yield frame
    yield from [frame] * hold
