"""Pictures as arrays and as files: uint8 RGB (H, W, 3)."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]


def resize(image: Picture, size: int) -> Picture:
    """To (size, size, 3) for looking at; not the policy's own resize."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def encode_png(image: Picture, optimize: bool = True) -> bytes:
    """PNG; `optimize` makes it a little smaller and takes several times as long."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def data_uri(content: bytes, mime: str) -> str:
    """`data:` address that carries the content itself, so that a page needs no second file."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
