"""Pixels against numbers recorded from TensorFlow 2.15, and against the TensorFlow that is installed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tensorflow_process import TensorFlow, center_cropped, compressed, resized

from prismatic.vla.images import (
    center_crop,
    crop_and_resize,
    decode_jpeg,
    encode_jpeg,
    from_planes,
    prepare_image,
    resize_lanczos3,
    to_planes,
)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "tensorflow_images.npz") as data:
        return dict(data)


def assert_same_pixels(ours: np.ndarray, theirs: np.ndarray) -> None:
    """At most one grey level off, on at most 0.01 % of the values."""
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of random colour: hard edges, and sums that fall exactly between two grey levels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(blocks.repeat(4, 0).repeat(4, 1)[:height, :width])


def test_each_stage_equals_the_recorded_tensorflow_pipeline(recorded: dict[str, np.ndarray]) -> None:
    image, resized = recorded["camera_256"], recorded["jpeg_lanczos3_224"]
    assert_same_pixels(resize_lanczos3(decode_jpeg(encode_jpeg(image)), 224), resized)
    assert_same_pixels(prepare_image(image, 224, crop=False), resized)
    assert_same_pixels(center_crop(resized), recorded["jpeg_lanczos3_cropped_224"])
    assert_same_pixels(prepare_image(image, 224, crop=True), recorded["jpeg_lanczos3_cropped_224"])


@pytest.mark.parametrize(
    ("height", "width", "size"), [(256, 256, 224), (128, 128, 112), (480, 640, 224), (50, 37, 112), (113, 112, 112)]
)
def test_lanczos3_equals_tensorflow(tensorflow: TensorFlow, height: int, width: int, size: int) -> None:
    image = noise_image(height, width)
    assert_same_pixels(resize_lanczos3(image, size), tensorflow(resized, image, size))


@pytest.mark.parametrize("size", [112, 224, 97])
def test_center_crop_equals_tensorflow(tensorflow: TensorFlow, size: int) -> None:
    image = noise_image(size, size, seed=1)
    assert_same_pixels(center_crop(image), tensorflow(center_cropped, image))


@pytest.mark.parametrize("size", [224, 112, 97, 64])
def test_center_crop_equals_the_crop_of_training_bit_for_bit(size: int) -> None:
    extent = np.sqrt(np.float32(0.9))
    start = torch.full((1,), float((np.float32(1) - extent) / 2))
    for seed in range(10):
        image = noise_image(size, size, seed) if seed % 2 else np.random.default_rng(seed).integers(
            256, size=(size, size, 3), dtype=np.uint8
        )  # fmt: skip
        planes = crop_and_resize(to_planes(torch.from_numpy(image)[None]), start, start, float(extent))
        np.testing.assert_array_equal(center_crop(image), from_planes(planes.clamp_(0, 1))[0].numpy())


def test_jpeg_equals_tensorflow(tensorflow: TensorFlow) -> None:
    image = noise_image(131, 90, seed=2)
    assert_same_pixels(decode_jpeg(encode_jpeg(image)), tensorflow(compressed, image))


def test_an_image_of_the_models_size_is_compressed_too() -> None:
    """Training images were compressed when they were stored, whatever their size."""
    image = noise_image(64, 64)
    before = image.copy()
    prepared = prepare_image(image, 64, crop=False)
    np.testing.assert_array_equal(prepared, decode_jpeg(encode_jpeg(image)))
    prepared[:] = 0  # no view
    np.testing.assert_array_equal(image, before)


def test_views_and_read_only_arrays_are_fine() -> None:
    image = noise_image(70, 90)
    image.flags.writeable = False
    rotated = image[::-1, ::-1]
    np.testing.assert_array_equal(prepare_image(rotated, 32, True), prepare_image(rotated.copy(), 32, True))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((64, 64, 3), np.float32), ["float32", "(64, 64, 3)", "uint8"]),
        (np.zeros((64, 64), np.uint8), ["(64, 64)"]),
        (np.zeros((3, 64, 64), np.uint8), ["(3, 64, 64)"]),
        (np.zeros((64, 64, 4), np.uint8), ["(64, 64, 4)"]),
        (np.zeros((0, 64, 3), np.uint8), ["(0, 64, 3)"]),
        ([[1, 2, 3]], ["list"]),
    ],
)
@pytest.mark.parametrize(
    "function", [lambda x: prepare_image(x, 32, False), lambda x: resize_lanczos3(x, 32), center_crop]
)
def test_wrong_images_are_named(function, image, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        function(image)
    assert all(word in str(error.value) for word in words)


def test_a_broken_jpeg_is_named() -> None:
    with pytest.raises(ValueError, match="cannot decode 9 bytes as JPEG"):
        decode_jpeg(b"not a jpg")
