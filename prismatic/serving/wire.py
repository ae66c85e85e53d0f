"""The wire format of policy servers: msgpack, in which NumPy arrays are bytes with their dtype and shape.

Byte for byte that of `openpi_client.msgpack_numpy` (https://github.com/Physical-Intelligence/openpi), so that either
end may be theirs. Objects are never pickled: whoever answers cannot run code here.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

_ARRAY, _SCALAR, _DATA, _DTYPE, _SHAPE = b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"
_KINDS = "biufSU"  # booleans, whole numbers, floats, byte strings, text


def pack(message: Any) -> bytes:
    """Nested dicts and lists of numbers, strings, bytes, NumPy arrays and scalars -> one message.

    Raises:
        ValueError: for arrays of objects, records, complex numbers or times.
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
        _check(value.dtype)
        return {_ARRAY: True, _DATA: value.tobytes(), _DTYPE: value.dtype.str, _SHAPE: value.shape}
    if isinstance(value, np.generic):
        _check(value.dtype)
        return {_SCALAR: True, _DATA: value.item(), _DTYPE: value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent; give numbers, strings, lists, dicts or NumPy arrays")


def _decode(found: dict[Any, Any]) -> Any:
    if _ARRAY in found:
        dtype, shape = _check(np.dtype(found[_DTYPE])), tuple(found[_SHAPE])
        size = math.prod(shape) * dtype.itemsize
        if len(found[_DATA]) != size:
            raise ValueError(f"{len(found[_DATA])} bytes for {dtype} {shape}, which takes {size}")
        return np.ndarray(shape, dtype, found[_DATA]).copy()
    if _SCALAR in found:
        return _check(np.dtype(found[_DTYPE])).type(found[_DATA])
    return found


def _check(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind not in _KINDS:
        raise ValueError(f"arrays of dtype {dtype} are not sent or taken; convert to numbers, booleans or text first")
    return dtype
