"""How what a pruner keeps changes while it is trained: the same frames, drawn again and again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from prismatic.pictures.frame import BACKGROUND, MARGIN, MUTED, TEXT, labelled_sheet, shorten
from prismatic.pictures.images import Picture
from prismatic.pictures.overlay import kept_grids
from prismatic.pictures.trace import PruningTrace

PANEL = 224
"""Side of one camera view in pixels: what ViTs are given, and two of them fit on a telephone."""

STRIP_PANEL = 176
"""The same in a strip of steps."""

_TITLE, _SMALL = 22, 16
_LEAST_WIDTH = 2 * (PANEL + MARGIN) + MARGIN
"""In which words have room, where there is one camera."""


@dataclass(frozen=True)
class FixedFrame:
    """A frame that a policy is shown again and again while it learns.

    Args:
        instruction: the sentence that goes with it.
        place: where it is from, as text.
        images: what each camera saw, uint8 (H, W, 3), in the policy's order.
    """

    instruction: str
    place: str
    images: tuple[Picture, ...]


@dataclass(frozen=True)
class Viewpoint:
    """How frames are looked at.

    Args:
        cameras: their names, in the policy's order.
        center_crop: whether the policy sees the central part only.
    """

    cameras: tuple[str, ...]
    center_crop: bool

    def trace(self, frame: FixedFrame, steps: Sequence[int], kept: NDArray[np.bool_]) -> PruningTrace:
        """What was kept of one frame, (L, V), after each of L steps of training."""
        images = tuple(np.broadcast_to(image, (len(steps), *image.shape)) for image in frame.images)
        return PruningTrace(
            frame.instruction, self.cameras, images, kept, np.asarray(steps, np.int64), self.center_crop
        )


def kept_picture(frames: Sequence[FixedFrame], kept: NDArray[np.bool_], step: int, view: Viewpoint) -> Picture:
    """All frames after one step of training, a row each, a column per camera: kept patches bright, the others dark.

    Args:
        frames: at least one.
        kept: (F, V), the visual tokens of each frame that stayed.
        step: of training.
        view: of all frames.

    Returns:
        uint8 (H, W, 3) with even sides, which the words do not change.
    """
    pitch, heading = PANEL + MARGIN, 2 * _line(_SMALL) + 4
    top = MARGIN + _line(_TITLE)
    width = max(MARGIN + len(view.cameras) * pitch, _LEAST_WIDTH)
    height = top + len(frames) * (heading + pitch)
    canvas = Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    title = f"step {step:,} · kept {kept.sum(1).mean():.1f} of {kept.shape[1]} tokens"
    _write(draw, (MARGIN, MARGIN // 2), title, _TITLE, TEXT, width)
    for row, (frame, mask) in enumerate(zip(frames, kept, strict=True)):
        y = top + row * (heading + pitch)
        counts = " + ".join(map(str, counts_per_image(mask, len(view.cameras))))
        _write(draw, (MARGIN, y), frame.instruction, _SMALL, TEXT, width)
        _write(draw, (MARGIN, y + _line(_SMALL)), f"kept {counts} · {frame.place}", _SMALL, MUTED, width)
        for column, picture in enumerate(view.trace(frame, [step], mask[None]).seen(0, PANEL)):
            canvas.paste(Image.fromarray(picture), (MARGIN + column * pitch, y + heading))
    return np.asarray(canvas)


def strip(frame: FixedFrame, kept: NDArray[np.bool_], steps: Sequence[int], view: Viewpoint, most: int) -> Picture:
    """One frame after several steps of training, side by side, a row per camera.

    Args:
        frame: that was looked at.
        kept: (L, V), the visual tokens that stayed after each of the steps.
        steps: of training, L.
        view: of the frame.
        most: so many of the steps are shown, chosen evenly from first to last.
    """
    trace = view.trace(frame, steps, kept)
    chosen = np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)
    rows = list(zip(*(trace.seen(number, STRIP_PANEL) for number in chosen), strict=True))
    columns = [f"step {steps[number]}\n{kept[number].sum()} of {kept.shape[1]}" for number in chosen]
    return labelled_sheet(rows, f"{frame.instruction} · dark is pruned", columns, view.cameras, STRIP_PANEL)


def counts_per_image(kept: NDArray[np.bool_], num_images: int) -> list[int]:
    """How many visual tokens of each image stayed, of a mask (V,)."""
    return [int(count) for count in kept_grids(kept, num_images).sum(axis=(1, 2))]


def padded(picture: Picture, height: int, width: int) -> Picture:
    """The picture at the top left of a larger one, for videos of pictures that differ in size."""
    if picture.shape[:2] == (height, width):
        return picture
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = BACKGROUND
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvas


def _line(size: int) -> int:
    return size * 5 // 4


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], width: int
) -> None:
    font = ImageFont.load_default(size)
    draw.text(place, shorten(draw, text, font, width - 2 * MARGIN), font=font, fill=colour)
