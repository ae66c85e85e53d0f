"""Pixels against numbers recorded from TensorFlow 2.15, and against the TensorFlow that is installed."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorflow_process import TensorFlow, center_cropped, compressed, decoded, resized

from prismatic.vla.images import (
    center_crop,
    crop_and_resize,
    decode_image,
    decode_jpeg,
    encode_jpeg,
    from_planes,
    is_decodable,
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


GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # PNG's numbers
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
DEPTHS = {GREY: (1, 2, 4, 8, 16), COLOUR: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), COLOUR_ALPHA: (8, 16)}


def png(kind: int, bits: int, interlaced: bool = False, transparency: bool = False) -> bytes:
    """A PNG file of random values, 13 x 11, of any kind that the standard knows; PIL writes only some of them."""
    rng = np.random.default_rng([kind, bits])
    values = rng.integers(0, 1 << bits, (13, 11, CHANNELS[kind]))
    passes = [values[row::rows, column::columns] for row, column, rows, columns in ADAM7] if interlaced else [values]
    header = struct.pack(">IIBBBBB", 11, 13, bits, kind, 0, 0, int(interlaced))
    parts = [_chunk(b"IHDR", header), _chunk(b"gAMA", struct.pack(">I", 30000))]  # TensorFlow ignores gamma
    if kind == PALETTE:
        parts.append(_chunk(b"PLTE", rng.integers(0, 256, 3 << bits, np.uint8).tobytes()))
    if transparency:
        seen_through = bytes(range(1 << bits)) if kind == PALETTE else values[0, 0].astype(">u2").tobytes()
        parts.append(_chunk(b"tRNS", seen_through))
    lines = b"".join(b"\0" + _packed(row, bits) for part in passes if part.size for row in part)
    parts += [_chunk(b"IDAT", zlib.compress(lines)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _packed(row: np.ndarray, bits: int) -> bytes:
    digits = (row.reshape(-1, 1) >> np.arange(bits)[::-1]) & 1
    return np.packbits(digits.astype(np.uint8)).tobytes()


def saved(picture: np.ndarray, image_format: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", CHANNELS, ids=["grey", "colour", "palette", "grey and alpha", "colour and alpha"])
def test_every_kind_of_png_decodes_as_in_tensorflow(tensorflow: TensorFlow, kind: int) -> None:
    for bits in DEPTHS[kind]:
        for interlaced in (False, True):
            for transparency in (False, True)[: 1 + (kind in (GREY, COLOUR, PALETTE))]:
                data = png(kind, bits, interlaced, transparency)
                ours, theirs = decode_image(data), tensorflow(decoded, data)
                assert ours.dtype == theirs.dtype == np.uint8
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{bits} bits, {interlaced=}, {transparency=}")


def cmyk(adobe: bytes | None) -> bytes:
    """A JPEG of four inks, with another (or without an) Adobe marker: its last byte says how they are transformed."""
    data = saved(noise_image(40, 33), "JPEG", "CMYK")
    marker = data.index(b"Adobe")
    return (
        data[: marker - 4] + data[marker + 12 :] if adobe is None else data[: marker + 11] + adobe + data[marker + 12 :]
    )


@pytest.mark.parametrize(
    "data",
    [
        saved(noise_image(40, 33), "PNG"),
        saved(noise_image(40, 33), "PNG", "RGBA"),
        saved(noise_image(40, 33), "JPEG"),
        saved(noise_image(40, 33), "JPEG", progressive=True, subsampling=0),
        saved(noise_image(40, 33), "JPEG", keep_rgb=True),
        saved(noise_image(40, 33), "JPEG", "L"),
        cmyk(b"\0"),
        cmyk(b"\2"),
        cmyk(None),
    ],
    ids=["png", "rgba", "jpeg", "progressive", "jpeg without luma", "grey jpeg", "cmyk", "ycck", "cmyk not inverted"],
)
def test_pictures_that_libraries_write_decode_as_in_tensorflow(tensorflow: TensorFlow, data: bytes) -> None:
    np.testing.assert_array_equal(decode_image(data), tensorflow(decoded, data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is an empty string; expected JPEG or PNG"),
        (zlib.compress(bytes(100)), "is zlib-compressed bytes"),
        (saved(noise_image(8, 8), "GIF"), "is GIF"),
        (saved(noise_image(8, 8), "BMP"), "is BMP"),
        (saved(noise_image(8, 8), "WEBP"), "is WebP"),
        (saved(noise_image(8, 8), "TIFF"), "is TIFF"),
        (noise_image(8, 8).tobytes(), "is no encoded picture"),
    ],
)
def test_other_formats_are_named(data: bytes, words: str) -> None:
    assert not is_decodable(data[:8])
    with pytest.raises(ValueError, match=words):
        decode_image(data)


def test_damaged_pictures_are_named() -> None:
    data = png(COLOUR, 8)
    flipped = bytearray(data)
    flipped[-30] ^= 255
    for damaged in (data[: len(data) // 2], data[:20], bytes(flipped)):
        with pytest.raises(ValueError, match=f"cannot decode {len(damaged)} bytes as PNG"):
            decode_image(damaged)
    with pytest.raises(ValueError, match="as JPEG"):
        decode_image(saved(noise_image(40, 33), "JPEG")[:300])
