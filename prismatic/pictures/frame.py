"""Captioned frames of several camera views, and sheets of pictures."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prismatic.pictures.images import Picture, resize

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


PANEL_SIZE = 256
"""Side of one camera view in a composed frame, in pixels."""

MARGIN = 8
BACKGROUND = (24, 26, 31)
TEXT = (226, 228, 233)
MUTED = (150, 155, 165)
_TITLE, _SMALL, _SHEET = 22, 18, 26
"""Sizes of letters in pixels: they must be readable where frames of two cameras and sheets are shown 400 px wide."""
_HEADING = 22
_LEAST_SHEET = 560  # Pixels of width that the title of a narrow sheet has.
_OUTCOME = {True: (92, 201, 128), False: (235, 111, 100)}


@dataclass(frozen=True)
class Caption:
    """The text above a composed frame.

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
        seen: The views of the last policy query with pruned patches dimmed; may be empty.

    Returns:
        uint8 (H', W', 3) with even sides, as video codecs want them. Words that change over time do not change them.
    """
    pitch, groups = size + MARGIN, [group for group in (live, seen) if group]
    stacked = max(map(len, groups)) > 1
    columns, rows = (max(map(len, groups)), len(groups)) if stacked else (len(groups), 1)
    width = MARGIN + columns * pitch
    title, context = (
        _wrapped(text, font, width) for text, font in ((caption.title, _TITLE), (caption.context, _SMALL))
    )
    strip = MARGIN + _TITLE * 5 // 4 * max(1, len(title)) + _SMALL * 5 // 4 * (len(context) + 1) + 4
    canvas = Image.new("RGB", (width + width % 2, strip + rows * (_HEADING + pitch)), BACKGROUND)
    canvas = canvas.crop((0, 0, canvas.width, canvas.height + canvas.height % 2))
    draw = ImageDraw.Draw(canvas)
    headings = ("now", "the last policy query: dark is pruned")
    for number, (group, heading) in enumerate(zip(groups, headings, strict=False)):
        x, y = (MARGIN, strip + number * (_HEADING + pitch)) if stacked else (MARGIN + number * pitch, strip)
        font = ImageFont.load_default(_SMALL)
        draw.text((x, y - 2), shorten(draw, heading, font, columns * size), font=font, fill=MUTED)
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
        if lines and (draw.textlength(longer, font) <= width - 2 * MARGIN or len(lines) == 2):
            lines[-1] = longer
        else:
            lines.append(word)
    return [shorten(draw, line, font, width - 2 * MARGIN) for line in lines]


def _draw_caption(draw: ImageDraw.ImageDraw, caption: Caption, lines: tuple[list[str], list[str]], width: int) -> None:
    title_font, small_font = ImageFont.load_default(_TITLE), ImageFont.load_default(_SMALL)
    outcome = caption.outcome or ("solved" if caption.success else "not solved")
    outcome = "" if caption.success is None else outcome
    y = MARGIN - 2
    for words, font, colour, size in (
        (lines[0] or [""], title_font, TEXT, _TITLE),
        (lines[1], small_font, TEXT, _SMALL),
    ):
        for line in words:
            draw.text((MARGIN, y), line, font=font, fill=colour)
            y += size * 5 // 4
    room = width - 2 * MARGIN - (draw.textlength(outcome, small_font) + 2 * MARGIN if outcome else 0)
    draw.text((MARGIN, y), shorten(draw, caption.detail, small_font, room), font=small_font, fill=MUTED)
    if caption.success is not None:
        draw.text((width - MARGIN, y), outcome, font=small_font, fill=_OUTCOME[caption.success], anchor="ra")


def shorten(draw: ImageDraw.ImageDraw, text: str, font: Font, room: float) -> str:
    """The text in one line, or as much of its beginning as has room, in pixels, before an ellipsis."""
    text = " ".join(text.split())
    if len(text) <= room and draw.textlength(text, font) <= room:  # a character is wider than a pixel
        return text
    fits = bisect_right(range(min(len(text), int(room))), room, key=lambda n: draw.textlength(text[:n] + "...", font))
    return text[: max(fits - 1, 0)].rstrip() + "..."


def sheet(rows: Sequence[Sequence[Picture]], size: int = PANEL_SIZE, gap: int = MARGIN) -> Picture:
    """Rows of square pictures, for reports. Shorter rows end empty."""
    columns = max(len(row) for row in rows)
    pitch = size + gap
    canvas = np.empty((len(rows) * pitch - gap, columns * pitch - gap, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
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
        columns: May have several lines each.
        names: Of the rows.
    """
    pictures = sheet(rows, size)
    font, line = ImageFont.load_default(_SHEET), _SHEET * 5 // 4
    width = max(line + pictures.shape[1], _LEAST_SHEET)
    words = _wrapped(title, _SHEET, width)
    headings = [column.split("\n") for column in columns]
    top = MARGIN // 2 + line * (len(words) + max(map(len, headings)))
    canvas = Image.new("RGB", (width, top + pictures.shape[0]), BACKGROUND)
    canvas.paste(Image.fromarray(pictures), (line, top))
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(words):
        draw.text((MARGIN, number * line), text, font=font, fill=TEXT)
    for number, heading in enumerate(headings):
        x = line + number * (size + MARGIN)
        for place, text in enumerate(reversed(heading), 1):
            draw.text((x, top - place * line), shorten(draw, text, font, size), font=font, fill=MUTED)
    for number, name in enumerate(names):
        label = Image.new("RGB", (size, line), BACKGROUND)
        side = ImageDraw.Draw(label)
        side.text((size // 2, 0), shorten(side, name, font, size), font=font, fill=MUTED, anchor="ma")
        canvas.paste(label.rotate(90, expand=True), (0, top + number * (size + MARGIN)))
    return np.asarray(canvas)
