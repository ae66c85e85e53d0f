"""Pictures of what the pruner kept: overlays, captioned frames, picture strips and videos.

Everything here works on uint8 RGB arrays (H, W, 3) and the boolean mask (V,) that `TokenSelection.kept()` gives per
sample. Visual tokens are ordered image by image and, inside an image, row by row over a square grid of patches.
"""

import base64
import contextlib
import io
import itertools
import math
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

CROP_AREA = 0.9
"""Share of the image that a centre-cropping policy sees."""

PANEL_SIZE = 256
"""Side of one camera view in a composed frame, in pixels."""

_MARGIN = 8
_BACKGROUND = (24, 26, 31)
_TEXT = (226, 228, 233)
_MUTED = (150, 155, 165)
_OUTLINE = (255, 205, 70)
_TITLE, _SMALL, _SHEET = 22, 18, 26
"""Sizes of letters in pixels: they must be readable where frames of two cameras and sheets are shown 400 px wide."""
_HEADING = 22
_LEAST_SHEET = 560  # Pixels of width that the title of a narrow sheet has.
_OUTCOME = {True: (92, 201, 128), False: (235, 111, 100)}


def kept_grids(kept: NDArray[np.bool_], num_images: int) -> NDArray[np.bool_]:
    """Mask over all visual tokens (V,) -> one square grid per image (I, G, G).

    Raises:
        ValueError: when V is not `num_images` squares.
    """
    kept = np.asarray(kept, dtype=bool).reshape(-1)
    per_image, rest = divmod(kept.size, num_images)
    grid = math.isqrt(per_image)
    if rest or grid * grid != per_image or per_image == 0:
        raise ValueError(f"{kept.size} visual tokens are not {num_images} square grids of patches")
    return kept.reshape(num_images, grid, grid)


def dim_pruned(image: Picture, grid: NDArray[np.bool_], center_crop: bool = False, strength: float = 0.7) -> Picture:
    """The image with every patch darkened and greyed that the pruner dropped.

    Args:
        image: uint8 (H, W, 3), the full camera view.
        grid: bool (G, G), True where the patch was kept.
        center_crop: The policy saw only the central `CROP_AREA` of the image: the grid is laid over that part, and the
            border, which it never saw, counts as dropped.
        strength: 0 leaves pruned patches alone, 1 makes them black.
    """
    seen = _kept_pixels(image, grid, center_crop)
    grey = image.mean(axis=2, keepdims=True)
    dimmed = (1.0 - strength) * (0.5 * image + 0.5 * grey)
    return np.where(seen[..., None], image, dimmed.round()).astype(np.uint8)


def outline_kept(image: Picture, grid: NDArray[np.bool_], center_crop: bool = False) -> Picture:
    """The image with a thin line just inside the border of every area of kept patches, which dark ones need.

    Args:
        image: uint8 (H, W, 3), the full camera view, dimmed or not.
        grid: bool (G, G), True where the patch was kept.
        center_crop: as in `dim_pruned`.
    """
    seen = np.pad(_kept_pixels(image, grid, center_crop), 1)
    inner = seen[1:-1, 1:-1] & seen[:-2, 1:-1] & seen[2:, 1:-1] & seen[1:-1, :-2] & seen[1:-1, 2:]
    edge = seen[1:-1, 1:-1] & ~inner
    return np.where(edge[..., None], np.array(_OUTLINE, np.uint8), image).astype(np.uint8)


def _kept_pixels(image: Picture, grid: NDArray[np.bool_], center_crop: bool) -> NDArray[np.bool_]:
    """(H, W): which pixels lie on kept patches."""
    height, width = image.shape[:2]
    side = math.sqrt(CROP_AREA) if center_crop else 1.0
    rows = _patch_of_pixel(height, grid.shape[0], side)
    columns = _patch_of_pixel(width, grid.shape[1], side)
    padded = np.pad(grid, ((0, 1), (0, 1)))  # The extra row and column stand for "outside".
    return padded[rows[:, None], columns[None, :]]


def _patch_of_pixel(pixels: int, patches: int, side: float) -> NDArray[np.int64]:
    """For every pixel along one axis the index of its patch; `patches` (one too many) where no patch covers it."""
    position = ((np.arange(pixels) + 0.5) / pixels - 0.5) / side + 0.5
    index = np.floor(position * patches).astype(np.int64)
    return np.where((index >= 0) & (index < patches), index, patches)


def resize(image: Picture, size: int) -> Picture:
    """To (size, size, 3) for looking at; not the policy's own resize."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Caption:
    """The words above a composed frame.

    Args:
        title: The instruction, say; long ones are broken into two lines.
        detail: What changes over time: the step, the number of tokens kept.
        success: None while it is open; otherwise it is said, in colour.
        context: What does not change: the start, a control; broken into two lines like the title.
        outcome: Words for how it ended; empty: `solved` or `not solved`.
    """

    title: str
    detail: str
    success: bool | None = None
    context: str = ""
    outcome: str = ""


def compose_frame(
    live: Sequence[Picture], seen: Sequence[Picture], caption: Caption, size: int = PANEL_SIZE
) -> Picture:
    """One video frame: a caption, the camera views as they are, and below them the views with pruned patches dimmed.

    The views of a single camera stand side by side.

    Args:
        live: Current camera views, uint8 (H, W, 3) each.
        seen: The views of the policy's last look with pruned patches dimmed; may be empty.

    Returns:
        uint8 (H', W', 3) with even sides, as video codecs want them. Words that change over time do not change them.
    """
    pitch, groups = size + _MARGIN, [group for group in (live, seen) if group]
    stacked = max(map(len, groups)) > 1
    columns, rows = (max(map(len, groups)), len(groups)) if stacked else (len(groups), 1)
    width = _MARGIN + columns * pitch
    title, context = (
        _wrapped(text, font, width) for text, font in ((caption.title, _TITLE), (caption.context, _SMALL))
    )
    strip = _MARGIN + _TITLE * 5 // 4 * max(1, len(title)) + _SMALL * 5 // 4 * (len(context) + 1) + 4
    canvas = Image.new("RGB", (width + width % 2, strip + rows * (_HEADING + pitch)), _BACKGROUND)
    canvas = canvas.crop((0, 0, canvas.width, canvas.height + canvas.height % 2))
    draw = ImageDraw.Draw(canvas)
    for number, (group, heading) in enumerate(zip(groups, ("now", "the last look: dark is pruned"), strict=False)):
        x, y = (_MARGIN, strip + number * (_HEADING + pitch)) if stacked else (_MARGIN + number * pitch, strip)
        font = ImageFont.load_default(_SMALL)
        draw.text((x, y - 2), _shorten(draw, heading, font, columns * size), font=font, fill=_MUTED)
        for panel in group:
            canvas.paste(Image.fromarray(resize(panel, size)), (x, y + _HEADING))
            x += pitch
    _draw_caption(draw, caption, (title, context), canvas.width)
    return np.asarray(canvas)


def _wrapped(text: str, font_size: int, width: int) -> list[str]:
    """At most two lines that fit into a frame of a width."""
    font, draw = ImageFont.load_default(font_size), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (draw.textlength(longer, font) <= width - 2 * _MARGIN or len(lines) == 2):
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shorten(draw, line, font, width - 2 * _MARGIN) for line in lines]


def _draw_caption(draw: ImageDraw.ImageDraw, caption: Caption, lines: tuple[list[str], list[str]], width: int) -> None:
    title_font, small_font = ImageFont.load_default(_TITLE), ImageFont.load_default(_SMALL)
    outcome = caption.outcome or ("solved" if caption.success else "not solved")
    outcome = "" if caption.success is None else outcome
    y = _MARGIN - 2
    for words, font, colour, size in (
        (lines[0] or [""], title_font, _TEXT, _TITLE),
        (lines[1], small_font, _TEXT, _SMALL),
    ):
        for line in words:
            draw.text((_MARGIN, y), line, font=font, fill=colour)
            y += size * 5 // 4
    room = width - 2 * _MARGIN - (draw.textlength(outcome, small_font) + 2 * _MARGIN if outcome else 0)
    draw.text((_MARGIN, y), _shorten(draw, caption.detail, small_font, room), font=small_font, fill=_MUTED)
    if caption.success is not None:
        draw.text((width - _MARGIN, y), outcome, font=small_font, fill=_OUTCOME[caption.success], anchor="ra")


def _shorten(draw: ImageDraw.ImageDraw, text: str, font: Font, room: float) -> str:
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(text + "...", font) > room:
        text = text[:-1]
    return text.rstrip() + "..."


def sheet(rows: Sequence[Sequence[Picture]], size: int = PANEL_SIZE, gap: int = _MARGIN) -> Picture:
    """Rows of square pictures, for reports. Shorter rows end empty."""
    columns = max(len(row) for row in rows)
    pitch = size + gap
    canvas = np.empty((len(rows) * pitch - gap, columns * pitch - gap, 3), dtype=np.uint8)
    canvas[:] = _BACKGROUND
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            canvas[top * pitch : top * pitch + size, left * pitch : left * pitch + size] = resize(image, size)
    return canvas


def labelled_sheet(
    rows: Sequence[Sequence[Picture]], title: str, columns: Sequence[str], names: Sequence[str], size: int = 176
) -> Picture:
    """A `sheet` under a title, with words above every column and along the left side of every row.

    Args:
        rows: Square pictures, uint8 (H, W, 3) each, as many in every row as there are `columns`.
        title: At most two lines of it are shown.
        names: Of the rows.
    """
    pictures = sheet(rows, size)
    font, line = ImageFont.load_default(_SHEET), _SHEET * 5 // 4
    width = max(line + pictures.shape[1], _LEAST_SHEET)
    words = _wrapped(title, _SHEET, width)
    top = _MARGIN // 2 + line * (len(words) + 1)
    canvas = Image.new("RGB", (width, top + pictures.shape[0]), _BACKGROUND)
    canvas.paste(Image.fromarray(pictures), (line, top))
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(words):
        draw.text((_MARGIN, number * line), text, font=font, fill=_TEXT)
    for number, column in enumerate(columns):
        draw.text(
            (line + number * (size + _MARGIN), top - line), _shorten(draw, column, font, size), font=font, fill=_MUTED
        )
    for number, name in enumerate(names):
        label = Image.new("RGB", (size, line), _BACKGROUND)
        side = ImageDraw.Draw(label)
        side.text((size // 2, 0), _shorten(side, name, font, size), font=font, fill=_MUTED, anchor="ma")
        canvas.paste(label.rotate(90, expand=True), (0, top + number * (size + _MARGIN)))
    return np.asarray(canvas)


@dataclass(frozen=True)
class PruningTrace:
    """What a policy saw over L looks of one episode, with I cameras.

    Args:
        title: Stands above the frames: the instruction, say.
        cameras: Their names, in the policy's order.
        images: Per camera what the policy was given, uint8 (L, H, W, 3).
        kept: (L, V) bool, the visual tokens that stayed.
        steps: (L,) how many control steps had been taken at each look.
        center_crop: Whether the policy saw the central part only.
        control_rate_hz: Control steps per second.
        scores: (L, V) the best score that any query gave each token, where there are scores.
        success: How the episode ended, where that is known.
        source: Where the pictures come from and which policy kept what, for titles; episodes of one title and source
            share maps.
        start: Where the episode began, in words.

    Raises:
        ValueError: when the numbers of looks or cameras differ, or V is not I squares.
    """

    title: str
    cameras: tuple[str, ...]
    images: tuple[NDArray[np.uint8], ...]
    kept: NDArray[np.bool_]
    steps: NDArray[np.int64]
    center_crop: bool = False
    control_rate_hz: float = 20.0
    scores: NDArray[np.float32] | None = None
    success: bool | None = None
    source: str = ""
    start: str = ""

    def __post_init__(self) -> None:
        looks = {len(part) for part in (*self.images, self.kept, self.steps, *self._scores)}
        if len(looks) != 1 or looks == {0} or len(self.images) != len(self.cameras):
            raise ValueError(
                f"{self.title!r}: {len(self.cameras)} cameras, {len(self.images)} rows of pictures, numbers of looks "
                f"{sorted(looks)}; expected a row per camera, and as many pictures, masks and steps as there are looks"
            )
        kept_grids(self.kept[0], len(self.images))

    @property
    def _scores(self) -> tuple[NDArray[np.float32], ...]:
        return () if self.scores is None else (self.scores,)

    @property
    def num_looks(self) -> int:
        """L."""
        return len(self.steps)

    @property
    def looks_per_second(self) -> float:
        """How often the policy looked, for playing the looks in real time; 1 where it looked once."""
        return self.control_rate_hz / float(np.median(np.diff(self.steps))) if self.num_looks > 1 else 1.0

    @property
    def grids(self) -> NDArray[np.bool_]:
        """(L, I, G, G) bool, the kept patches of every camera."""
        return np.stack([kept_grids(row, len(self.images)) for row in self.kept])

    def seen(self, look: int, size: int = PANEL_SIZE) -> list[Picture]:
        """One look's pictures (size, size, 3) with pruned patches dimmed and kept ones outlined."""
        drawn = []
        for pictures, grid in zip(self.images, kept_grids(self.kept[look], len(self.images)), strict=True):
            dimmed = dim_pruned(resize(pictures[look], size), grid, self.center_crop)
            drawn.append(outline_kept(dimmed, grid, self.center_crop))
        return drawn

    def frame(self, look: int) -> Picture:
        """One look as a captioned frame: the pictures, and beside them the same with pruned patches dimmed."""
        row = self.kept[look]
        detail = f"step {self.steps[look]} · kept {row.sum()} of {row.size} visual tokens"
        if len(self.cameras) > 1:
            counts = kept_grids(row, len(self.cameras)).sum(axis=(1, 2))
            detail += f" ({' + '.join(map(str, counts))})"
        last = look in (self.num_looks - 1, -1)
        caption = Caption(self.title, detail, self.success if last else None, self.context)
        return compose_frame([pictures[look] for pictures in self.images], self.seen(look), caption)

    @property
    def context(self) -> str:
        """Start and source."""
        return " · ".join(filter(None, (self.start, self.source)))

    def overview(self, columns: int = 6, size: int = 176) -> Picture:
        """What was kept at a few looks from first to last, a row per camera."""
        chosen = np.linspace(0, self.num_looks - 1, min(columns, self.num_looks)).round().astype(int)
        rows = list(zip(*(self.seen(look, size) for look in chosen), strict=True))
        title = " · ".join(filter(None, (self.title, self.context, "dark is pruned")))
        return labelled_sheet(rows, title, [f"step {self.steps[look]}" for look in chosen], self.cameras, size)


def write_mp4(path: str | Path, frames: Iterable[Picture], fps: float) -> Path:
    """H.264 in MP4, playable in any browser. Frames are uint8 (H, W, 3), all of one even-sided shape.

    They may come from a generator; no more than one at a time is held. After an error there is no file.

    Raises:
        ValueError: without frames, or when their shapes differ or have odd sides.
        ImportError: when imageio-ffmpeg is missing.
        RuntimeError: when ffmpeg fails, with its words.
    """
    waiting = iter(frames)
    first = next(waiting, None)
    if first is None or any(side % 2 for side in first.shape[:2]):
        found = "none" if first is None else first.shape
        raise ValueError(f"a video needs frames of one shape with even sides, got {found}")
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError("writing videos needs imageio-ffmpeg: pip install 'imageio[ffmpeg]'") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = first.shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "25", "-preset", "veryfast", "-movflags", "+faststart"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *source, *target, str(path)]
    with tempfile.TemporaryFile() as words, subprocess.Popen(command, stdin=subprocess.PIPE, stderr=words) as ffmpeg:
        try:
            _feed(ffmpeg, itertools.chain([first], waiting), first.shape)
        except BaseException:
            ffmpeg.kill()
            ffmpeg.wait()
            path.unlink(missing_ok=True)
            raise
        if ffmpeg.wait():
            words.seek(0)
            path.unlink(missing_ok=True)
            raise RuntimeError(f"ffmpeg could not write {path}: {words.read().decode(errors='replace').strip()}")
    return path


def _feed(ffmpeg: subprocess.Popen[bytes], frames: Iterable[Picture], shape: tuple[int, ...]) -> None:
    """Hand all frames over. Raises ValueError at the first one of another shape."""
    assert ffmpeg.stdin is not None
    with contextlib.suppress(BrokenPipeError), ffmpeg.stdin as stream:  # where ffmpeg gives up it says why
        for frame in frames:
            if frame.shape != shape:
                raise ValueError(f"a video needs frames of one shape with even sides, got {shape} and {frame.shape}")
            stream.write(frame.tobytes())


def encode_png(image: Picture, optimize: bool = True) -> bytes:
    """PNG; `optimize` makes it a little smaller and takes several times as long."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def data_uri(content: bytes, mime: str) -> str:
    """`data:` address that carries the content itself, so that a page needs no second file."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
