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
_MOST_SIDES = 8
_MOST_ITEMS, _MOST_CONTAINERS, _MOST_VALUES = 16_384, 20_000, 200_000
"""Items of one list or dict, lists and dicts of a message, and all items of its lists together. An empty list is a byte
of a message and a hundred bytes of memory: without limits, 16 MB of them are more than a gigabyte."""


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
        ValueError: for bytes that are no such message, for arrays of a kind that `pack` refuses, for msgpack's
            extensions, and for more lists, dicts and items than policies and servers have to say.
    """
    count = _Count()
    try:
        return msgpack.unpackb(
            data,
            object_hook=count.decode_dict,
            list_hook=count.look_at_list,
            ext_hook=_refuse_extension,
            max_array_len=_MOST_ITEMS,
            max_map_len=_MOST_ITEMS,
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"not a message in msgpack with NumPy arrays ({type(error).__name__}: {error})") from error


class _Count:
    """How many lists, dicts and items of lists one message has had so far."""

    def __init__(self) -> None:
        self._containers = self._values = 0

    def decode_dict(self, found: dict[Any, Any]) -> Any:
        self._add(0)
        return _decode(found)

    def look_at_list(self, found: list[Any]) -> list[Any]:
        self._add(len(found))
        return found

    def _add(self, values: int) -> None:
        self._containers += 1
        self._values += values
        if self._containers > _MOST_CONTAINERS or self._values > _MOST_VALUES:
            raise ValueError("more lists, dicts or items than a message has; send numbers as NumPy arrays")


def _refuse_extension(code: int, _: bytes) -> Any:
    raise ValueError(f"msgpack's extension {code} has no meaning here")


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
        dtype, shape = read_dtype(found[_DTYPE]), read_shape(found[_SHAPE])
        size = math.prod(shape) * dtype.itemsize
        if len(found[_DATA]) != size:
            raise ValueError(f"{len(found[_DATA])} bytes for {dtype} {shape}, which takes {size}")
        return np.ndarray(shape, dtype, found[_DATA]).copy()
    if _SCALAR in found:
        dtype, value = read_dtype(found[_DTYPE]), found[_DATA]
        # NumPy's own reading of others may be large: `numpy.bytes_(10**9)` is a billion bytes.
        if not isinstance(value, {"S": bytes, "U": str}.get(dtype.kind, (bool, int, float))):
            raise ValueError(f"a scalar of {dtype} whose value is a {type(value).__name__}")
        return dtype.type(value)
    return found


def _check(words: str) -> str:
    if not _DTYPE_WORDS.fullmatch(words):
        raise ValueError(
            f"arrays of dtype {words[:40]} are not sent or taken; convert to numbers, booleans or text first"
        )
    return words


def read_dtype(words: str) -> np.dtype[Any]:
    """The dtype of that name. Raises ValueError for anything but booleans, numbers and text."""
    # NumPy's own reader takes more than names: a small language, in which an element may also have no bytes at all.
    try:
        return np.dtype(_check(words))
    except TypeError as error:  # a text longer than NumPy counts
        raise ValueError(f"arrays of dtype {words} are not taken ({error})") from error


def read_shape(sides: Any) -> tuple[int, ...]:
    """An array's shape as it came in a message.

    Raises ValueError for anything but a list of up to `_MOST_SIDES` whole numbers: a list or a text among them would be
    repeated when they are multiplied, to any size.
    """
    if not isinstance(sides, list) or len(sides) > _MOST_SIDES:
        raise ValueError(f"an array whose shape is no list of up to {_MOST_SIDES} whole numbers")
    if not all(type(side) is int and 0 <= side < 2**31 for side in sides):
        raise ValueError(f"an array's shape is {str(sides)[:60]}; expected whole numbers")
    return tuple(sides)
