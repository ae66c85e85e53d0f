import math
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from prismatic.pictures.frame import Caption, compose_frame, labelled_sheet, sheet
from prismatic.pictures.images import data_uri, encode_png
from prismatic.pictures.overlay import dim_pruned, kept_grids, outline_kept
from prismatic.pictures.trace import PruningTrace
from prismatic.pictures.video import write_mp4
from prismatic.vla.crop import CROP_AREA


def checker(size: int = 56) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(60, 256, (size, size, 3)).astype(np.uint8)


def test_kept_grids_follow_images_then_rows() -> None:
    kept = np.zeros(2 * 9, dtype=bool)
    kept[1] = kept[9 + 5] = True  # image 0: row 0, column 1; image 1: row 1, column 2
    grids = kept_grids(kept, num_images=2)
    assert grids.shape == (2, 3, 3)
    assert [tuple(place) for place in np.argwhere(grids)] == [(0, 0, 1), (1, 1, 2)]


@pytest.mark.parametrize(("tokens", "images"), [(10, 2), (9, 2), (0, 1)])
def test_kept_grids_refuse_what_is_not_square(tokens: int, images: int) -> None:
    with pytest.raises(ValueError, match="square grids"):
        kept_grids(np.zeros(tokens, dtype=bool), images)


def test_dim_pruned_leaves_kept_patches_and_darkens_the_others() -> None:
    image, grid = checker(56), np.eye(7, dtype=bool)
    dimmed = dim_pruned(image, grid)
    for row in range(7):
        for column in range(7):
            patch = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            if grid[row, column]:
                assert (dimmed[patch] == image[patch]).all()
            else:
                assert dimmed[patch].mean() < 0.4 * image[patch].mean()


def test_dim_pruned_lays_the_grid_over_the_centre_crop() -> None:
    image = np.full((200, 200, 3), 255, dtype=np.uint8)
    dimmed = dim_pruned(image, np.ones((4, 4), dtype=bool), center_crop=True)
    seen = (dimmed == 255).all(axis=2)
    assert seen.mean() == pytest.approx(CROP_AREA, abs=0.02)
    border = round(100 * (1 - math.sqrt(CROP_AREA)))
    assert not seen[: border - 1].any() and seen[border + 1 : -border - 1, border + 1 : -border - 1].all()


def test_compose_frame_places_the_views_and_has_even_sides() -> None:
    views = [np.full((64, 64, 3), 40 * i, dtype=np.uint8) for i in (1, 2, 3, 4)]
    frame = compose_frame(views[:2], views[2:], Caption("a task", "step 3", success=True), size=64)
    assert frame.shape[0] % 2 == 0 and frame.shape[1] % 2 == 0
    assert (frame == [92, 201, 128]).all(axis=2).any()  # the outcome, in green
    corners = [np.argwhere((frame == 40 * i).all(axis=2)) for i in (1, 2, 3, 4)]
    assert all(np.ptp(pixels, axis=0).tolist() == [63, 63] for pixels in corners)
    (top, left), (right, below) = corners[0].min(axis=0), (corners[1].min(axis=0), corners[2].min(axis=0))
    assert right.tolist() == [top, left + 64 + 8] and below[0] > top + 64 and below[1] == left
    single = compose_frame(views[:1], views[1:2], Caption("", ""), size=64)
    places = [np.argwhere((single == 40 * i).all(axis=2)).min(axis=0) for i in (1, 2)]
    assert places[0][0] == places[1][0] and places[0][1] + 64 < places[1][1], "one camera: side by side"


def test_compose_frame_keeps_its_shape_whatever_changes() -> None:
    """Words that stay for a whole video may take a second line, no more; those that change may not."""
    views = [checker(), checker()]

    def shape(*words: Any) -> tuple[int, ...]:
        return compose_frame(views, views, Caption(*words), size=64).shape

    details = [shape("a", *rest, "start") for rest in (("", None), ("x" * 300, False), ("b", True))]
    assert len(set(details)) == 1
    assert shape("", "") == shape("a", "") < shape("long " * 20, "") == shape("long " * 500, "")
    assert shape("a", "", None, "start") < shape("a", "", None, "start " * 50)


def test_letters_are_legible_where_frames_and_sheets_are_400_pixels_wide() -> None:
    """Capital letters, drawn and measured: at least 6 px high there, which is the height of those of a 9 px font."""
    views, bare, words = [np.zeros((8, 8, 3), np.uint8)] * 2, Caption("", "", None, ""), "HEIGHT"
    for caption in (Caption(words, ""), Caption("", words)):
        frame = compose_frame(views, views, caption)
        changed = np.argwhere((frame != compose_frame(views, views, bare)).any(axis=2))[:, 0]
        assert (np.ptp(changed) + 1) * 400 / frame.shape[1] > 8
    rows = [[views[0]] * 6] * 2
    drawn, empty = (labelled_sheet(rows, "x", [text] * 6, ["", ""]) for text in (words, ""))
    changed = np.argwhere((drawn != empty).any(axis=2))[:, 0]
    assert (np.ptp(changed) + 1) * 400 / drawn.shape[1] > 6


def test_a_labelled_sheet_holds_its_pictures_and_words_everywhere() -> None:
    rows = [[np.full((32, 32, 3), 10 * (3 * r + c + 5), np.uint8) for c in range(3)] for r in range(2)]
    picture = labelled_sheet(rows, "a title", ["step 0", "step 8", "step 16"], ["front", "wrist"], size=176)
    places = np.array([np.argwhere((picture == r[c][0, 0]).all(axis=2)).min(axis=0) for r in rows for c in range(3)])
    places = places.reshape(2, 3, 2)
    assert (np.diff(places[..., 0], axis=0) == 184).all() and (np.diff(places[..., 1], axis=1) == 184).all()
    top, left = places[0, 0]
    written = picture.max(axis=2) > 100
    for column in range(3):
        assert written[top - 32 : top, places[0, column, 1] : places[0, column, 1] + 176].any()
    for row in range(2):
        assert written[places[row, 0, 0] : places[row, 0, 0] + 176, :left].any()
    assert written[: top - 32].any()


def test_sheet_puts_pictures_in_rows() -> None:
    image = checker(32)
    picture = sheet([[image, image, image], [image]], size=32, gap=4)
    assert picture.shape == (2 * 32 + 4, 3 * 32 + 2 * 4, 3)
    assert (picture[:32, 36:68] == image).all() and (picture[36:, :32] == image).all()
    assert picture[36:, 36:].std() < 5 and picture[32:36].std() < 5


def test_write_mp4_can_be_read_back(tmp_path: Path) -> None:
    frames = [np.full((48, 64, 3), value, dtype=np.uint8) for value in (0, 80, 160, 240)]
    path = write_mp4(tmp_path / "videos" / "clip.mp4", frames, fps=10)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True)
    assert b"64x48" in decoded.stderr and b"10 fps" in decoded.stderr and b"yuv420p" in decoded.stderr
    found = np.frombuffer(decoded.stdout, np.uint8).reshape(-1, 48, 64, 3).mean(axis=(1, 2, 3))
    assert found == pytest.approx([0, 80, 160, 240], abs=4)


def test_write_mp4_refuses_mixed_shapes(tmp_path: Path) -> None:
    frames = [np.zeros((48, 64, 3), np.uint8), np.zeros((48, 48, 3), np.uint8)]
    with pytest.raises(ValueError, match="one shape"):
        write_mp4(tmp_path / "clip.mp4", frames, fps=10)
    with pytest.raises(ValueError, match="one shape"):
        write_mp4(tmp_path / "clip.mp4", [], fps=10)
    with pytest.raises(ValueError, match="even sides"):
        write_mp4(tmp_path / "clip.mp4", [np.zeros((48, 65, 3), np.uint8)], fps=10)
    assert not (tmp_path / "clip.mp4").exists()


def test_write_mp4_says_what_ffmpeg_says(tmp_path: Path) -> None:
    frames = (np.zeros((480, 640, 3), np.uint8) for _ in range(100))
    with pytest.raises(RuntimeError, match=r"ffmpeg could not write .*clip\.mp4: .*framerate"):
        write_mp4(tmp_path / "clip.mp4", frames, fps=-1)
    assert next(frames, None) is not None and not (tmp_path / "clip.mp4").exists()


def test_png_round_trip(tmp_path: Path) -> None:
    image = checker()
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(image))
    with Image.open(path) as opened:
        assert (np.asarray(opened) == image).all()
    assert data_uri(b"abc", "text/plain") == "data:text/plain;base64,YWJj"


def test_outline_kept_draws_inside_the_border_only() -> None:
    image, grid = np.zeros((40, 40, 3), dtype=np.uint8), np.zeros((4, 4), dtype=bool)
    grid[1, 1:3] = grid[0, 0] = True
    drawn = outline_kept(image, grid).any(axis=2)
    kept = np.kron(grid, np.ones((10, 10), dtype=bool))
    for row in range(40):
        for column in range(40):
            around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            inside = all(0 <= r < 40 and 0 <= c < 40 and kept[r, c] for r, c in around)
            assert drawn[row, column] == (kept[row, column] and not inside)


def trace_of(queries: int = 3, **changes: object) -> PruningTrace:
    images = (np.stack([checker(64)] * queries), np.stack([checker(64)[::-1]] * queries))
    kept = np.zeros((queries, 2 * 4), dtype=bool)
    kept[:, [0, 5]] = True
    parts = {"title": "lift it", "cameras": ("a", "b"), "images": images, "kept": kept, "success": True}
    return PruningTrace(**{**parts, "steps": 4 * np.arange(queries), **changes})  # type: ignore[arg-type]


def test_a_trace_shows_kept_patches_bright() -> None:
    trace = trace_of()
    first, second = trace.seen(0, size=64)
    image = trace.images[0][0]
    assert (first[2:30, 2:30] == image[2:30, 2:30]).all()
    assert first[32:].mean() < 0.4 * image[32:].mean()
    assert (second[2:30, 34:62] == trace.images[1][0][2:30, 34:62]).all()
    frame = trace.frame(0)
    assert frame.shape[0] % 2 == 0 and frame.shape == trace.frame(2).shape
    assert (trace.frame(2) != trace_of(success=None).frame(2)).any(), "the last frame says how it ended"
    assert (frame == trace_of(success=None).frame(0)).all()
    assert trace.overview(columns=2, size=32).shape == trace_of(success=None).overview(columns=3, size=32).shape
    assert trace.queries_per_second == 5.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": np.arange(2)}, r"numbers of policy queries \[2, 3\]"),
        ({"cameras": ("a",)}, "1 cameras, 2 rows of pictures"),
        ({"scores": np.zeros((4, 8), np.float32)}, r"numbers of policy queries \[3, 4\]"),
        ({"kept": np.ones((3, 7), dtype=bool)}, "square grids"),
    ],
)
def test_a_trace_refuses_parts_that_do_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trace_of(**changes)
