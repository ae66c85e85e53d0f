"""Shares of classes on patches, against the picture that the policy's own pipeline makes."""

import numpy as np
import pytest

from experiments.robot.libero.looks.classes import BACKGROUND, CLASSES, TARGET
from experiments.robot.libero.looks.shares import count_pixels, lies_on, shares_of
from prismatic.vla.images import prepare_image

GRID, SIZE = 7, 112


@pytest.mark.parametrize("crop", [False, True])
def test_a_class_lies_where_the_policy_sees_it(crop: bool) -> None:
    """A white thing on black, as the policy is shown it: each patch is as bright as its share of the thing."""
    classes = np.full((256, 256), BACKGROUND, np.uint8)
    classes[40:97, 130:171] = TARGET
    classes[200:256, 0:30] = TARGET
    picture = np.where(classes == TARGET, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    seen = prepare_image(picture, SIZE, crop)[..., 0] / 255
    side = SIZE // GRID
    expected = seen.reshape(GRID, side, GRID, side).mean(axis=(1, 3)).reshape(-1)
    shares = shares_of(count_pixels(classes, GRID, crop))
    assert np.abs(shares[:, TARGET] - expected).max() < 0.03
    assert (shares[:, TARGET] > 0.5).sum() >= 2
    turned = shares_of(count_pixels(classes[:, ::-1], GRID, crop))
    assert np.abs(turned[:, TARGET] - expected).max() > 0.5


def test_every_pixel_that_is_seen_counts_once() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(len(CLASSES), size=(128, 128)).astype(np.uint8)
    counts = count_pixels(classes, GRID, center_crop=False)
    assert counts.shape == (GRID * GRID, len(CLASSES))
    np.testing.assert_array_equal(counts.sum(axis=0), np.bincount(classes.ravel()))
    np.testing.assert_allclose(shares_of(counts).sum(axis=1), 1.0)
    cropped = count_pixels(classes, GRID, center_crop=True)
    assert abs(cropped.sum() / classes.size - 0.9) < 0.02


def test_a_token_lies_on_a_thing_from_a_tenth_and_on_background_alone() -> None:
    pixels = np.zeros((4, len(CLASSES)), np.int64)
    pixels[:, BACKGROUND] = (100, 91, 89, 0)
    pixels[:, TARGET] = (0, 9, 11, 100)
    assert lies_on(pixels, TARGET).tolist() == [False, False, True, True]
    assert lies_on(pixels, BACKGROUND).tolist() == [True, True, False, False]
