import numpy as np
import pytest

from prismatic.pictures.learning import PANEL, FixedFrame, Viewpoint, counts_per_image, kept_picture, padded, strip

VIEW = Viewpoint(("full_image", "wrist_image"), center_crop=False)


def frame(seed: int = 0) -> FixedFrame:
    images = np.random.default_rng(seed).integers(40, 255, (2, PANEL, PANEL, 3), dtype=np.uint8)
    return FixedFrame("put the bowl on the plate", "episode 3, step 40", (images[0], images[1]))


def test_kept_patches_are_as_they_were_and_the_others_dark():
    kept = np.zeros((1, 2 * 16), bool)
    kept[0, 0] = kept[0, 16 + 15] = True  # the first patch of one camera, the last of the other
    picture = kept_picture([frame()], kept, 1000, VIEW)
    height, width = picture.shape[:2]
    assert picture.dtype == np.uint8 and height % 2 == width % 2 == 0
    first, second = frame().images
    patch, inner = PANEL // 4, slice(2, -2)  # without the outline
    rows = slice(height - 9 - PANEL, height - 9)  # a row of pixels makes the height even
    left, right = picture[rows, 8 : 8 + PANEL], picture[rows, 16 + PANEL : 16 + 2 * PANEL]
    assert np.array_equal(left[:patch, :patch][inner, inner], first[:patch, :patch][inner, inner])
    assert np.array_equal(right[-patch:, -patch:][inner, inner], second[-patch:, -patch:][inner, inner])
    assert left[patch:, patch:].max() < 90 and right[:patch].max() < 90
    assert counts_per_image(kept[0], 2) == [1, 1]


def test_words_do_not_change_the_size_and_every_frame_has_a_row():
    few, all_of_them = np.zeros((2, 32), bool), np.ones((2, 32), bool)
    few[:, 0] = True
    sizes = {
        kept_picture([frame(), frame(1)], kept, step, VIEW).shape for kept, step in ((few, 0), (all_of_them, 10**6))
    }
    assert len(sizes) == 1
    (size,) = sizes
    one = kept_picture([frame()], few[:1], 0, VIEW).shape
    assert size[0] > one[0] + PANEL and size[1] == one[1]
    assert padded(np.zeros((2, 4, 3), np.uint8), 6, 8).shape == (6, 8, 3)


@pytest.mark.parametrize("instruction", ["put the bowl\non the plate", "", "very " * 50_000 + "long"])
def test_any_sentence_can_be_drawn(instruction: str):
    of_any = FixedFrame(instruction, "episode 3, step 40", frame().images)
    kept = np.ones((1, 32), bool)
    assert kept_picture([of_any], kept, 0, VIEW).shape == kept_picture([frame()], kept, 0, VIEW).shape


@pytest.mark.parametrize(("looks", "columns"), [(1, 1), (3, 3), (40, 10)])
def test_a_strip_shows_steps_from_first_to_last(looks: int, columns: int):
    kept = np.ones((looks, 32), bool)
    picture = strip(frame(), kept, [50 * number for number in range(looks)], VIEW, most=10)
    assert picture.shape[1] == max(560, 32 + columns * 184 - 8)
