"""Decoding, JPEG round trip, lanczos3 and crop: equal to the TensorFlow pipeline of published policies, without it.

Published checkpoints were trained and evaluated on pixels that TensorFlow resized. These functions give the same
uint8 values. What inference needs is NumPy, each image on one thread: threads of torch that wait for each other would
stall a policy beside a busy process.
"""

import functools
import io
import math

import numpy as np
import simplejpeg
import torch
from PIL import Image

from prismatic.vla.crop import CROP_AREA

_JPEG_QUALITY = 95  # TensorFlow's default
_LANCZOS_RADIUS = 3.0


def check_image(image: np.ndarray, name: str = "image") -> np.ndarray:
    """Return `image` if it is a (H, W, 3) uint8 array; raise ValueError naming dtype and shape otherwise."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name} must be a (height, width, 3) uint8 NumPy array, but is a {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"{name} must have shape (height, width, 3) and dtype uint8 (RGB, 0 to 255), but has shape {image.shape} "
            f"and dtype {image.dtype}"
        )
    return image


def encode_jpeg(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> JPEG bytes, quality 95 with 4:2:0 chroma, as TensorFlow encodes."""
    buffer = io.BytesIO()
    Image.fromarray(check_image(image)).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def decode_jpeg(data: bytes | memoryview) -> np.ndarray:
    """JPEG bytes -> (H, W, 3) uint8, grey and CMYK ones as well. Raises ValueError if `data` is no whole JPEG.

    The fast inverse transform is the one TensorFlow decodes with; the accurate one differs by a few grey levels.
    """
    try:
        if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
            return _decode_cmyk(data)
        return simplejpeg.decode_jpeg(data, fastdct=True)
    except ValueError as error:
        raise ValueError(
            f"cannot decode {len(data)} bytes as JPEG (they start with {bytes(data[:4])!r}): {error}"
        ) from None


def _decode_cmyk(data: bytes | memoryview) -> np.ndarray:
    """Ink to light as TensorFlow computes it: with Adobe's marker values are stored inverted."""
    inks = simplejpeg.decode_jpeg(data, colorspace="CMYK", fastdct=True).astype(np.int32)
    light = inks if "adobe" in Image.open(io.BytesIO(data)).info else 255 - inks
    return (light[..., 3:] * light[..., :3] // 255).astype(np.uint8)


def _decode_png(data: bytes | memoryview) -> np.ndarray:
    """PNG bytes -> (H, W, 3) uint8: alpha is dropped, grey repeated, of 16 bits the upper 8 are taken."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.info.pop("transparency", None)  # one more form of alpha
            if image.mode.startswith("I"):  # 16 bits of grey
                pixels = (np.asarray(image) >> 8).astype(np.uint8)
            else:
                # PNG's 16 bits of colour are read as 8. Conversion of RGBA drops the alpha channel as it is.
                pixels = np.asarray(image if image.mode in ("RGB", "L") else image.convert(_without_alpha(image.mode)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode {len(data)} bytes as PNG: {error}") from None
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def _without_alpha(mode: str) -> str:
    return "L" if mode in ("1", "LA") else "RGB"


_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "gzip",
    b"\x78\x01": "zlib-compressed bytes",
    b"\x78\x5e": "zlib-compressed bytes",
    b"\x78\x9c": "zlib-compressed bytes",
    b"\x78\xda": "zlib-compressed bytes",
}
_DECODERS = {"JPEG": decode_jpeg, "PNG": _decode_png}
SIGNATURE_BYTES = max(map(len, _SIGNATURES))
"""So many bytes at the start of a picture tell its format."""


@functools.lru_cache(maxsize=256)
def image_format(start: bytes) -> str:
    """What the first `SIGNATURE_BYTES` bytes of a stored picture say it is, in words for a message."""
    if not start:
        return "an empty string"
    for signature, name in _SIGNATURES.items():
        if start.startswith(signature):
            return name
    return f"no encoded picture (its bytes start with {start!r})"


def is_decodable(start: bytes) -> bool:
    """Whether `decode_image` reads pictures of the format that begins so."""
    return image_format(start) in _DECODERS


def decode_image(data: bytes | memoryview) -> np.ndarray:
    """JPEG or PNG bytes -> (H, W, 3) uint8, as `tf.io.decode_image(data, channels=3)` gives them.

    Raises ValueError for a damaged picture, and for any other format, naming it.
    """
    found = image_format(bytes(data[:SIGNATURE_BYTES]))
    if found not in _DECODERS:
        raise ValueError(f"the picture is {found}; expected JPEG or PNG")
    return _DECODERS[found](data)


# float32 sine as C libraries compute it: a short polynomial per quadrant, not always the nearest float32. Its last bit
# decides the weights' last bit, and with it how a sum that lies half-way between two grey levels is rounded.
_SINE = (-0.16666654943701084, 0.008332178146138854, -0.00019517298981385725)
_COSINE = (-0.49999999725108224, 0.041666623324344516, -0.001388676379437604, 2.4390450703564542e-05)


def _sin_float32(angle: np.float32) -> np.float32:
    x = float(angle)
    quadrant = round(x / (math.pi / 2))
    x -= quadrant * (math.pi / 2)
    square = x * x
    if quadrant % 2:
        value = 1.0 + square * (_COSINE[0] + square * (_COSINE[1] + square * (_COSINE[2] + square * _COSINE[3])))
    else:
        value = x + x * square * (_SINE[0] + square * (_SINE[1] + square * _SINE[2]))
    return np.float32(-value if quadrant % 4 >= 2 else value)


def _lanczos3_kernel(x: np.float32) -> np.float32:
    pi, radius = np.float32(math.pi), np.float32(_LANCZOS_RADIUS)
    if x > radius:
        return np.float32(0)
    if x <= np.float32(1e-3):
        return np.float32(1)
    return radius * _sin_float32(pi * x) * _sin_float32(pi * x / radius) / (pi * pi * x * x)


@functools.lru_cache(maxsize=64)
def lanczos3_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Resampling of one axis, antialiased when shrinking, in TensorFlow's float32 arithmetic.

    Returns:
        Source positions (T, size_out) int64 and weights (T, size_out, 1) float32 of the T taps of every output
        position. An output position with fewer taps ends in weights of 0. Shared by all callers: read only.
    """
    inverse_scale = np.float32(1) / (np.float32(size_out) / np.float32(size_in))
    stretch = max(inverse_scale, np.float32(1))  # antialias: a wider kernel when shrinking
    reach, half = np.float32(_LANCZOS_RADIUS) * stretch, np.float32(0.5)
    count = min(2 * math.ceil(reach) + 1, size_in)
    positions = np.zeros((count, size_out), np.int64)
    weights = np.zeros((count, size_out, 1), np.float32)
    for out in range(size_out):
        centre = inverse_scale * (np.float32(out) + half)
        start = max(math.ceil(centre - reach - half), 0)
        stop = min(math.floor(centre + reach - half) + 1, size_in)
        distances = np.abs(np.arange(start, stop).astype(np.float32) + half - centre) * (np.float32(1) / stretch)
        taps = [_lanczos3_kernel(distance) for distance in distances]
        total = functools.reduce(np.add, taps, np.float32(0))
        weights[: len(taps), out, 0] = np.asarray(taps) * (np.float32(1) / total)
        positions[:, out] = np.minimum(start + np.arange(count), size_in - 1)
    used = weights.any(axis=(1, 2))
    return positions[used], weights[used]


def _resample_rows(rows: np.ndarray, size: int) -> np.ndarray:
    """(H, N) float32 -> (size, N). Tap after tap, because the order of a float32 sum decides exact ties."""
    positions, weights = lanczos3_taps(len(rows), size)
    total = rows.take(positions[0], axis=0)
    total *= weights[0]
    term = np.empty_like(total)
    for position, weight in zip(positions[1:], weights[1:], strict=True):
        rows.take(position, axis=0, out=term, mode="clip")  # all are inside; "raise" would copy once more
        term *= weight
        total += term
    return total


def resize_lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8, as `tf.image.resize(..., "lanczos3", antialias=True)` then round.

    The aspect ratio is not kept. Raises ValueError on any other dtype or shape.
    """
    height, width = check_image(image).shape[:2]
    if height == width == size:
        return image.copy()  # every weight falls on its own pixel: the identity
    x = _resample_rows(image.astype(np.float32, order="C").reshape(height, width * 3), size)
    x = _resample_rows(x.reshape(size, width, 3).swapaxes(0, 1).reshape(width, size * 3), size)
    x = np.clip(np.rint(x, out=x), 0, 255, out=x).astype(np.uint8)
    return np.ascontiguousarray(x.reshape(size, size, 3).swapaxes(0, 1))


def to_planes(images: torch.Tensor) -> torch.Tensor:
    """(I, H, W, 3) uint8 -> (I, 3, H, W) float32 in [0, 1], as `tf.image.convert_image_dtype` scales."""
    return images.permute(0, 3, 1, 2).contiguous().float().mul_(float(np.float32(1 / 255)))


def from_planes(planes: torch.Tensor) -> torch.Tensor:
    """(I, 3, H, W) float32 -> (I, H, W, 3) uint8, as `tf.image.convert_image_dtype` scales back (it truncates).

    Works in place on `planes`.
    """
    return planes.mul_(255.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def crop_and_resize(planes: torch.Tensor, top: torch.Tensor, left: torch.Tensor, extent: float) -> torch.Tensor:
    """Cut a square box out of every image and enlarge it bilinearly to the full size, as `tf.image.crop_and_resize`.

    Args:
        planes: (I, 3, H, W) float32.
        top, left: (I,) float32, the box's first row and column as fractions of height and width.
        extent: side of the box as a fraction of the image's side.

    Returns:
        (I, 3, H, W) float32.
    """
    count, channels, height, width = planes.shape
    first, second, weight = _bilinear(top, extent, height)
    shape = (count, channels, height, width)
    # Whole rows are copied from a list of all rows: several times faster than a gather along the height.
    offsets = torch.arange(0, count * channels * height, height, device=planes.device).view(count, channels, 1)
    every_row = planes.reshape(-1, width)
    upper = every_row.index_select(0, (offsets + first[:, None]).flatten()).view(shape)
    lower = every_row.index_select(0, (offsets + second[:, None]).flatten()).view(shape)
    rows = upper.lerp_(lower, weight[:, None, :, None])
    first, second, weight = _bilinear(left, extent, width)
    before = rows.gather(3, first[:, None, None, :].expand(shape))
    after = rows.gather(3, second[:, None, None, :].expand(shape))
    return before.lerp_(after, weight[:, None, None, :])


def _bilinear(start: torch.Tensor, extent: float, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per output position of one axis: the two source positions and the weight of the second; each (I, size)."""
    step = ((start + extent) - start) * (size - 1) / max(size - 1, 1)  # rounds as TensorFlow's y2 - y1 does
    outputs = torch.arange(size, dtype=torch.float32, device=start.device)
    positions = start[:, None] * (size - 1) + outputs * step[:, None]
    low = positions.floor()
    return low.long(), positions.ceil().long().clamp_(max=size - 1), positions - low


@functools.lru_cache(maxsize=64)
def _center_taps(size: int, area: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per output position of one axis: both sources, the nearer one, and the step from there as a fraction; (size,)."""
    extent = np.sqrt(np.float32(area))
    start = torch.full((1,), float((np.float32(1) - extent) / np.float32(2)))
    first, second, weight = (x[0].numpy() for x in _bilinear(start, float(extent), size))
    near = np.where(weight < 0.5, first, second)
    return first, second, near, np.where(weight < 0.5, weight, weight - np.float32(1)).astype(np.float64)


def _enlarge_center(x: np.ndarray, axis: int, area: float) -> np.ndarray:
    """As `torch.lerp` between the sources of every output position: product and sum are rounded once, to float32."""
    first, second, near, weight = _center_taps(x.shape[axis], area)
    step = (x.take(second, axis) - x.take(first, axis)).astype(np.float64)
    step *= weight[:, None, None] if axis == 0 else weight[:, None]
    step += x.take(near, axis)
    return step.astype(np.float32)


def center_crop(image: np.ndarray, area: float = CROP_AREA) -> np.ndarray:
    """The central `area` of a (H, W, 3) uint8 image, enlarged bilinearly back to (H, W, 3) uint8.

    Bit for bit what `crop_and_resize` gives between `to_planes` and `from_planes`.
    """
    x = check_image(image) * np.float32(1 / 255)
    x = _enlarge_center(_enlarge_center(x, 0, area), 1, area)
    return np.clip(np.multiply(x, np.float32(255.5), out=x), 0, 255, out=x).astype(np.uint8)


def prepare_image(image: np.ndarray, size: int, crop: bool) -> np.ndarray:
    """Raw camera image -> what the model was trained to see: JPEG round trip, lanczos3, and the centre crop if `crop`.

    The round trip happens at any size: stored training images were compressed once, whatever their size.

    Args:
        image: (H, W, 3) uint8.
        size: side of the model's input in pixels.
        crop: whether to take the central 0.9 of the area.

    Returns:
        (size, size, 3) uint8, never a view of `image`. Raises ValueError on any other dtype or shape.
    """
    image = resize_lanczos3(decode_jpeg(encode_jpeg(check_image(image))), size)
    return center_crop(image) if crop else image
