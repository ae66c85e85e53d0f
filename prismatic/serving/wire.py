"""The wire format of policy servers: msgpack, in which NumPy arrays are bytes with their dtype and shape.

Byte for byte that of `openpi_client.msgpack_numpy` (https://github.com/Physical-Intelligence/openpi), so that either
end may be theirs. Objects are never pickled: whoever answers cannot run code here.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

_ARRAY, _SCALAR, _DATA, _DTYPE, _SHAPE = b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"
_DTYPE_WORDS = re.compile(r"[<>=|]?(\?|b1|[iu][1248]|f[248]|[SU][1-9]\d{0,8})", re.ASCII)
"""How NumPy names what means the same on every machine: booleans, whole numbers, floats, byte strings, text."""


def pack(message: Any) -> bytes:
    """Nested dicts and lists of numbers, strings, bytes, NumPy arrays and scalars -> one message.

    Raises:
        ValueError: for arrays of objects, records, complex numbers or times, and of texts without any letter.
        TypeError: for anything else that has no place in a message.
    """
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """Inverse of `pack`; tuples come back as lists, arrays may be written to.

    Raises:
        ValueError: for bytes that are no such message, and for arrays of a kind that `pack` refuses.
    """
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException) as error:
        raise ValueError(f"not a message in msgpack with NumPy arrays ({type(error).__name__}: {error})") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _check(value.dtype.str)
        return {_ARRAY: True, _DATA: value.tobytes(), _DTYPE: value.dtype.str, _SHAPE: value.shape}
    if isinstance(value, np.generic):
        _check(value.dtype.str)
        return {_SCALAR: True, _DATA: value.item(), _DTYPE: value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent; give numbers, strings, lists, dicts or NumPy arrays")


def _decode(found: dict[Any, Any]) -> Any:
    if _ARRAY in found:
        dtype, shape = _read_dtype(found[_DTYPE]), tuple(found[_SHAPE])
        size = math.prod(shape) * dtype.itemsize
        if len(found[_DATA]) != size:
            raise ValueError(f"{len(found[_DATA])} bytes for {dtype} {shape}, which takes {size}")
        return np.ndarray(shape, dtype, found[_DATA]).copy()
    if _SCALAR in found:
        if not isinstance(found[_DATA], bool | int | float | str | bytes):
            raise ValueError(f"a scalar whose value is a {type(found[_DATA]).__name__}")
        return _read_dtype(found[_DTYPE]).type(found[_DATA])
    return found


def _check(words: str) -> str:
    if not _DTYPE_WORDS.fullmatch(words):
        raise ValueError(f"arrays of dtype {words} are not sent or taken; convert to numbers, booleans or text first")
    return words


def _read_dtype(words: str) -> np.dtype[Any]:
    # NumPy's own reader takes more than names: a small language, in which an element may also have no bytes at all.
    return np.dtype(_check(words))
