import math
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from prismatic import visualization as vis


def checker(size: int = 56) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(60, 256, (size, size, 3)).astype(np.uint8)


def test_kept_grids_follow_images_then_rows() -> None:
    kept = np.zeros(2 * 9, dtype=bool)
    kept[1] = kept[9 + 5] = True  # image 0: row 0, column 1; image 1: row 1, column 2
    grids = vis.kept_grids(kept, num_images=2)
    assert grids.shape == (2, 3, 3)
    assert [tuple(place) for place in np.argwhere(grids)] == [(0, 0, 1), (1, 1, 2)]


@pytest.mark.parametrize(("tokens", "images"), [(10, 2), (9, 2), (0, 1)])
def test_kept_grids_refuse_what_is_not_square(tokens: int, images: int) -> None:
    with pytest.raises(ValueError, match="square grids"):
        vis.kept_grids(np.zeros(tokens, dtype=bool), images)


def test_dim_pruned_leaves_kept_patches_and_darkens_the_others() -> None:
    image, grid = checker(56), np.eye(7, dtype=bool)
    dimmed = vis.dim_pruned(image, grid)
    for row in range(7):
        for column in range(7):
            patch = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            if grid[row, column]:
                assert (dimmed[patch] == image[patch]).all()
            else:
                assert dimmed[patch].mean() < 0.4 * image[patch].mean()


def test_dim_pruned_lays_the_grid_over_the_centre_crop() -> None:
    image = np.full((200, 200, 3), 255, dtype=np.uint8)
    dimmed = vis.dim_pruned(image, np.ones((4, 4), dtype=bool), center_crop=True)
    seen = (dimmed == 255).all(axis=2)
    assert seen.mean() == pytest.approx(vis.CROP_AREA, abs=0.02)
    border = round(100 * (1 - math.sqrt(vis.CROP_AREA)))
    assert not seen[: border - 1].any() and seen[border + 1 : -border - 1, border + 1 : -border - 1].all()


def test_compose_frame_places_the_views_and_has_even_sides() -> None:
    views = [np.full((64, 64, 3), 40 * i, dtype=np.uint8) for i in (1, 2, 3, 4)]
    frame = vis.compose_frame(views[:2], views[2:], vis.Caption("a task", "step 3", success=True), size=64)
    assert frame.shape[0] % 2 == 0 and frame.shape[1] % 2 == 0
    values = frame[-40]
    assert [bool((values == 40 * i).all(axis=1).any()) for i in (1, 2, 3, 4)] == [True] * 4


def test_compose_frame_keeps_its_shape_whatever_the_words() -> None:
    views = [checker(), checker()]
    shapes = {
        vis.compose_frame(views, views, caption, size=64).shape
        for caption in (vis.Caption("", ""), vis.Caption("long " * 100, "x" * 300, False), vis.Caption("a", "b", True))
    }
    assert len(shapes) == 1


def test_sheet_puts_pictures_in_rows() -> None:
    image = checker(32)
    picture = vis.sheet([[image, image, image], [image]], size=32, gap=4)
    assert picture.shape == (2 * 32 + 4, 3 * 32 + 2 * 4, 3)
    assert (picture[:32, 36:68] == image).all() and (picture[36:, :32] == image).all()
    assert picture[36:, 36:].std() < 5 and picture[32:36].std() < 5


def test_write_mp4_can_be_read_back(tmp_path: Path) -> None:
    frames = [np.full((48, 64, 3), value, dtype=np.uint8) for value in (0, 80, 160, 240)]
    path = vis.write_mp4(tmp_path / "videos" / "clip.mp4", frames, fps=10)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True)
    assert b"64x48" in decoded.stderr and b"10 fps" in decoded.stderr and b"yuv420p" in decoded.stderr
    found = np.frombuffer(decoded.stdout, np.uint8).reshape(-1, 48, 64, 3).mean(axis=(1, 2, 3))
    assert found == pytest.approx([0, 80, 160, 240], abs=4)


def test_write_mp4_refuses_mixed_shapes(tmp_path: Path) -> None:
    frames = [np.zeros((48, 64, 3), np.uint8), np.zeros((48, 48, 3), np.uint8)]
    with pytest.raises(ValueError, match="one shape"):
        vis.write_mp4(tmp_path / "clip.mp4", frames, fps=10)
    with pytest.raises(ValueError, match="one shape"):
        vis.write_mp4(tmp_path / "clip.mp4", [], fps=10)


def test_png_round_trip(tmp_path: Path) -> None:
    image = checker()
    path = tmp_path / "a.png"
    path.write_bytes(vis.encode_png(image))
    with Image.open(path) as opened:
        assert (np.asarray(opened) == image).all()
    assert vis.data_uri(b"abc", "text/plain") == "data:text/plain;base64,YWJj"


def test_outline_kept_draws_inside_the_border_only() -> None:
    image, grid = np.zeros((40, 40, 3), dtype=np.uint8), np.zeros((4, 4), dtype=bool)
    grid[1, 1:3] = grid[0, 0] = True
    drawn = vis.outline_kept(image, grid).any(axis=2)
    kept = np.kron(grid, np.ones((10, 10), dtype=bool))
    for row in range(40):
        for column in range(40):
            around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            inside = all(0 <= r < 40 and 0 <= c < 40 and kept[r, c] for r, c in around)
            assert drawn[row, column] == (kept[row, column] and not inside)


def trace_of(looks: int = 3, **changes: object) -> vis.PruningTrace:
    images = (np.stack([checker(64)] * looks), np.stack([checker(64)[::-1]] * looks))
    kept = np.zeros((looks, 2 * 4), dtype=bool)
    kept[:, [0, 5]] = True
    parts = {"title": "lift it", "cameras": ("a", "b"), "images": images, "kept": kept, "success": True}
    return vis.PruningTrace(**{**parts, "steps": 4 * np.arange(looks), **changes})  # type: ignore[arg-type]


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
    assert trace.overview(columns=2, size=32).shape == (2 * 32 + 8, 2 * 32 + 8, 3)
    assert trace.looks_per_second == 5.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": np.arange(2)}, r"numbers of looks \[2, 3\]"),
        ({"cameras": ("a",)}, "1 cameras, 2 rows of pictures"),
        ({"scores": np.zeros((4, 8), np.float32)}, r"numbers of looks \[3, 4\]"),
        ({"kept": np.ones((3, 7), dtype=bool)}, "square grids"),
    ],
)
def test_a_trace_refuses_parts_that_do_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trace_of(**changes)
