"""Augmentation against tf.image, and properties of the draws."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from tensorflow_process import TensorFlow, augmented

from prismatic.vla.augmentation import AugmentationParameters, augment


def picture_batch(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, hard edges, greys and full black and white in every picture."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    images[:, : height // 4] = np.linspace(0, 255, width)[None, None, :, None].astype(np.uint8)
    images[:, height // 4 : height // 2, :, 1] = np.linspace(255, 0, width).astype(np.uint8)
    images[:, -8:, :8], images[:, -8:, -8:] = 0, 255
    return images


def draw(count: int, seed: int = 0) -> AugmentationParameters:
    return AugmentationParameters.draw(np.random.default_rng(seed), count)


def nothing(count: int) -> AugmentationParameters:
    return AugmentationParameters(*(torch.full((count,), value) for value in (0.0, 0.0, 0.0, 1.0, 1.0, 0.0)))


@pytest.mark.parametrize(("height", "width"), [(112, 112), (96, 136)])
def test_equals_tensorflow(tensorflow: TensorFlow, height: int, width: int) -> None:
    images, parameters = picture_batch(12, height, width), draw(12)
    values = [{f.name: getattr(parameters, f.name)[i].item() for f in fields(parameters)} for i in range(12)]
    expected = tensorflow(augmented, images, values)
    difference = np.abs(augment(images, parameters).numpy().astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


def test_a_batch_equals_its_images_one_by_one_and_leaves_them_alone() -> None:
    images, parameters = picture_batch(5, 48, 48), draw(5)
    before = images.copy()
    together = augment(images, parameters)
    for i in range(5):
        single = AugmentationParameters(*(getattr(parameters, f.name)[i : i + 1] for f in fields(parameters)))
        torch.testing.assert_close(augment(images[i : i + 1], single)[0], together[i], rtol=0, atol=0)
    np.testing.assert_array_equal(images, before)


def test_each_parameter_does_what_its_name_says() -> None:
    grey = np.full((1, 16, 16, 3), 100, np.uint8)
    one = nothing(1)
    assert augment(grey, replace(one, brightness=torch.tensor([0.2]))).unique().tolist() == [151]
    for field, value in (("contrast", 1.2), ("saturation", 1.2), ("hue", 0.05)):  # a grey plane has nothing to change
        np.testing.assert_array_equal(augment(grey, replace(one, **{field: torch.tensor([value])})).numpy(), grey)
    red = np.zeros((1, 16, 16, 3), np.uint8)
    red[..., 0] = 200
    turned = augment(red, replace(one, hue=torch.tensor([0.05])))[0, 0, 0].tolist()
    assert turned[0] == 200 and 55 <= turned[1] <= 65 and turned[2] == 0  # towards yellow
    rows = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None, None], (1, 16, 16, 3))
    assert augment(rows.copy(), replace(one, top=torch.tensor([0.0])))[0, 0, 0, 0] == 0
    assert augment(rows.copy(), replace(one, top=torch.tensor([0.05])))[0, 0, 0, 0] > 0


def test_draws_are_independent_cover_their_ranges_and_repeat() -> None:
    parameters = draw(20000)
    ranges = [(0, 0.0513167), (0, 0.0513167), (-0.2, 0.2), (0.8, 1.2), (0.8, 1.2), (-0.05, 0.05)]
    values = torch.stack([getattr(parameters, f.name) for f in fields(parameters)])
    for row, (low, high) in zip(values, ranges, strict=True):
        assert low <= row.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < row.max() <= high
    correlation = torch.corrcoef(values) - torch.eye(6)
    assert correlation.abs().max() < 0.05
    torch.testing.assert_close(draw(7, seed=3).hue, draw(7, seed=3).hue, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), ["float32"]),
        (np.zeros((8, 8, 3), np.uint8), ["(8, 8, 3)"]),
        (np.zeros((3, 8, 8, 3), np.uint8), ["3 images", "2"]),
    ],
)
def test_wrong_images_are_named(images: np.ndarray, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        augment(images, draw(2))
    assert all(word in str(error.value) for word in words)


@pytest.mark.gpu
def test_the_gpu_gives_the_same_pixels() -> None:
    images, parameters = picture_batch(4, 112, 112), draw(4)
    there = augment(torch.from_numpy(images).cuda(), parameters).cpu().int()
    difference = (there - augment(images, parameters).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-4
