"""One rollout of each task drawn: what the policy was shown, kept patches bright, the classes that matter outlined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from experiments.robot.libero.looks.classes import GOAL, GRIPPER, TARGET
from experiments.robot.libero.looks.phases import PHASES
from experiments.robot.libero.looks.seen import Seen
from experiments.robot.libero.results.results import EpisodeRecord
from prismatic.pictures.frame import BACKGROUND, MARGIN, TEXT, labelled_sheet, shorten
from prismatic.pictures.images import Picture, encode_png, resize
from prismatic.pictures.overlay import dim_pruned, kept_grids, patch_of_pixels
from prismatic.pictures.video import write_mp4

COLOURS = {TARGET: (88, 230, 110), GOAL: (90, 165, 255), GRIPPER: (255, 160, 60)}
"""Class -> colour of its outline."""
SIZE = 240
"""Side of a view in pixels."""
MOMENTS = 6
_LINE = 235
_HOLD_SECONDS = 1.0
_LEGEND = 26


def draw(task: Sequence[tuple[EpisodeRecord, Seen]], center_crop: bool, fps: float, path: Path) -> list[Path]:
    """Write a sheet (`.png`) and a video (`.mp4`) of a task's first solved rollout, or of its first.

    Args:
        task: rollouts in their order; those without pictures are passed over.
        center_crop: whether the policy sees the central part of the pictures only.
        fps: policy queries a second.
        path: without suffix.

    Returns:
        What was written; nothing where no rollout has pictures.
    """
    pictured = [(record, seen) for record, seen in task if seen.images]
    if not pictured:
        return []
    record, seen = next((each for each in pictured if each[0].success), pictured[0])
    sheet, video = path.with_suffix(".png"), path.with_suffix(".mp4")
    sheet.write_bytes(encode_png(moments_sheet(record, seen, center_crop)))
    return [sheet, write_mp4(video, _frames(record, seen, center_crop, fps), fps)]


def moments_sheet(record: EpisodeRecord, seen: Seen, center_crop: bool) -> Picture:
    """A row per camera and a column per moment, under the instruction, over what the outlines mean."""
    chosen = moments(seen.phases)
    columns = [[view(seen, camera, query, center_crop) for query in chosen] for camera in range(len(seen.cameras))]
    headings = [f"{PHASES[seen.phases[query]]}, step {seen.steps[query]}\n{_kept(seen, query)}" for query in chosen]
    ended = f"initial state {record.initial_state}, {'solved' if record.success else 'not solved'}"
    title = f"{record.instruction} · {ended} · dark is pruned"
    return _with_legend(labelled_sheet(columns, title, headings, _names(seen), SIZE), seen)


def moments(phases: NDArray[np.int64], most: int = MOMENTS) -> list[int]:
    """Queries to show, in order: the middle of each phase's longest stretch, then those farthest from the others."""
    ends = np.flatnonzero(np.diff(phases)) + 1
    stretches = np.split(np.arange(len(phases)), ends)
    longest: dict[int, NDArray[np.int64]] = {}
    for stretch in stretches:
        phase = int(phases[stretch[0]])
        if len(stretch) > len(longest.get(phase, ())):
            longest[phase] = stretch
    chosen = {int(stretch[len(stretch) // 2]) for stretch in longest.values()}
    while len(chosen) < min(most, len(phases)):
        apart = [min(abs(query - other) for other in chosen) for query in range(len(phases))]
        chosen.add(int(np.argmax(apart)))
    return sorted(chosen)


def view(seen: Seen, camera: int, query: int, center_crop: bool) -> Picture:
    """One camera at one query, (SIZE, SIZE, 3): pruned patches dark, the outlines of `COLOURS` over it.

    Around kept patches there is a faint line, which black things need.
    """
    grid = kept_grids(seen.kept[query], len(seen.cameras))[camera]
    picture = dim_pruned(resize(seen.images[camera][query], SIZE), grid, center_crop).copy()
    kept = np.append(grid.reshape(-1), False)[patch_of_pixels((SIZE, SIZE), len(grid), center_crop)]
    edge = kept & _rim(~kept)
    picture[edge] = (picture[edge].astype(int) + _LINE) // 2
    classes = np.asarray(Image.fromarray(seen.classes[camera][query]).resize((SIZE, SIZE), Image.Resampling.NEAREST))
    for kind, colour in reversed(COLOURS.items()):
        picture[_rim(classes == kind)] = colour
    return picture


def _rim(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The line of pixels just outside a region."""
    padded = np.pad(inside, 1)
    near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return near & ~inside


def _frames(record: EpisodeRecord, seen: Seen, center_crop: bool, fps: float) -> Iterator[Picture]:
    """A frame per policy query; the last one stays for a moment."""
    for query in range(len(seen.steps)):
        views = [view(seen, camera, query, center_crop) for camera in range(len(seen.cameras))]
        phase = f"{PHASES[seen.phases[query]]}, step {seen.steps[query]}"
        words = [phase, _kept(seen, query)][: len(views)]
        frame = labelled_sheet([views], record.instruction, words, [""], SIZE)
        yield (frame := _even(_with_legend(frame, seen)))
    yield from [frame] * round(_HOLD_SECONDS * fps)


def _kept(seen: Seen, query: int) -> str:
    return f"kept {int(seen.kept[query].sum())} of {seen.kept.shape[1]}"


def _names(seen: Seen) -> list[str]:
    return [camera.replace("_", " ") for camera in seen.cameras]


def _with_legend(picture: Picture, seen: Seen) -> Picture:
    """With what the outlines mean below it."""
    targets, goals = (" and ".join(dict.fromkeys(names)) for names in zip(*seen.names, strict=True))
    words = {
        kind: text.replace("_", " ")
        for kind, text in ((TARGET, f"target: {targets}"), (GOAL, f"goal: {goals}"), (GRIPPER, "gripper"))
    }
    canvas = Image.new("RGB", (picture.shape[1], picture.shape[0] + _LEGEND + MARGIN), BACKGROUND)
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    room = canvas.width - 2 * MARGIN - 44 * len(words)
    sizes = [ImageFont.load_default(size) for size in (18, 16, 14)]
    fitting = (font for font in sizes if sum(draw.textlength(text, font) for text in words.values()) <= room)
    font = next(fitting, sizes[-1])
    x, y = MARGIN, picture.shape[0] + MARGIN // 2
    for kind, text in words.items():
        draw.rectangle((x, y + 3, x + 16, y + 19), outline=COLOURS[kind], width=3)
        shown = shorten(draw, text, font, canvas.width - x - 24)
        draw.text((x + 24, y), shown, font=font, fill=TEXT)
        x += round(44 + draw.textlength(shown, font))
    return np.asarray(canvas)


def _even(picture: Picture) -> Picture:
    """With even sides, as video codecs want them."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
