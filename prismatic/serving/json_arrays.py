"""NumPy arrays in JSON as OpenVLA-OFT's clients and servers have them: `json_numpy`'s objects of base64, dtype, shape.

What comes is read within limits: nothing is unpacked to more than it says, and nothing but plain numbers is taken.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any

import numpy as np

from prismatic.serving.wire import read_dtype, read_shape

_ARRAY = "__numpy__"
_MOST_VALUES, _MOST_CONTAINERS = 1_000_000, 250_000
"""Commas and brackets of a message: a picture as nested lists has 150,000 and 50,000, a bomb millions."""


def loads(data: bytes | str) -> Any:
    """One JSON text with arrays in it -> dicts, lists, numbers, text, NumPy arrays, which may be written to.

    Raises ValueError for what is no JSON (NaN and infinity are none), too nested, or has an array that is none.
    """
    try:
        # Not left to `json.loads`, which guesses at UTF-16 and lets half characters through.
        text = data if isinstance(data, str) else data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON: no UTF-8 at byte {error.start}") from error
    if text.count(",") > _MOST_VALUES or text.count("[") + text.count("{") > _MOST_CONTAINERS:
        raise ValueError("JSON with more values than a request has; send pictures as json_numpy's arrays")
    try:
        return json.loads(text, object_hook=_decode, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at {error.pos})") from error


def dumps(value: Any) -> str:
    """Inverse of `loads`. Raises ValueError for NaN or infinity outside arrays."""
    return json.dumps(value, default=_encode, allow_nan=False)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        data = base64.b64encode(value.tobytes()).decode()
        return {_ARRAY: data, "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(f"a {type(value).__name__} cannot be sent; give numbers, strings, lists, dicts or NumPy arrays")


def _decode(found: dict[str, Any]) -> Any:
    if _ARRAY not in found:
        return found
    words, data = found.get("dtype"), found[_ARRAY]
    if not isinstance(words, str) or not isinstance(data, str):
        raise ValueError("an array of json_numpy is text in base64, a dtype and a list for its shape")
    dtype, shape = read_dtype(words), read_shape(found.get("shape"))
    try:
        content = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"an array whose base64 cannot be read ({error})") from error
    if len(content) != (size := math.prod(shape) * dtype.itemsize):
        raise ValueError(f"{len(content)} bytes for {dtype} {shape}, which takes {size}")
    array = np.frombuffer(content, dtype).reshape(shape).copy()
    return array if shape else array[()]


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"not JSON: {word} is no number")
