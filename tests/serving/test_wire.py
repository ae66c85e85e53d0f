"""The wire format. That it is openpi's own, byte for byte, is tested in `test_openpi_client.py`."""

import struct
from typing import Any

import msgpack
import numpy as np
import pytest

from prismatic.serving.wire import pack, unpack


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
        np.array([1.5, -2.25], dtype=">f8"),  # big end first
        np.array([True, False]),
        np.zeros((0, 7)),
        np.array(3.5),
        np.array(["bowl", "plate"]),
    ],
)
def test_arrays_come_back_with_dtype_shape_and_values(array: np.ndarray) -> None:
    back = unpack(pack({"x": array}))["x"]
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)
    back[...] = back.dtype.type()  # may be written to
    assert back.flags.owndata or back.base is None


def test_plain_values_and_scalars_come_back() -> None:
    message = {"prompt": "pick up the bowl", "list": [1, 2.5, None, True], "raw": b"\x00\xff", "inner": {"a": {}}}
    assert unpack(pack(message)) == message
    scalar = unpack(pack(np.float32(0.1)))
    assert type(scalar) is np.float32 and scalar == np.float32(0.1)
    assert unpack(pack((1, 2))) == [1, 2]


def test_an_array_is_a_map_of_bytes_dtype_and_shape() -> None:
    """Against msgpack's specification: the message written out by hand."""
    written = (
        b"\x84" + b"\xc4\x0b__ndarray__\xc3" + b"\xc4\x04data\xc4\x04" + struct.pack("<2h", 7, -1)
        + b"\xc4\x05dtype\xa3<i2" + b"\xc4\x05shape\x91\x02"
    )  # fmt: skip
    assert pack(np.array([7, -1], dtype="<i2")) == written
    np.testing.assert_array_equal(unpack(written), [7, -1])


@pytest.mark.parametrize("dtype", ["O", "c16", "M8[s]", "i4,f4"])
def test_arrays_of_other_kinds_are_refused_on_both_sides(dtype: str) -> None:
    array = np.zeros(2, dtype=dtype)
    with pytest.raises(ValueError, match="are not sent or taken"):
        pack({"x": array})
    fields = {b"data": bytes(array.nbytes), b"dtype": np.dtype(dtype).str, b"shape": [2]}
    with pytest.raises(ValueError, match="are not sent or taken"):
        unpack(msgpack.packb({b"__ndarray__": True, **fields}))


@pytest.mark.parametrize(
    "dtype", ["S0", "<U0", "f8,(", "(2)f8", "3f8", "f16", "V4", "<f8 ", "S", "float32", ["f8"], None]
)
def test_no_other_word_reaches_numpy_s_reader_of_dtypes(dtype: Any) -> None:
    """Without bytes per element any shape has the right size: this one would take as many terabytes as it says."""
    fields = {b"data": b"", b"dtype": dtype, b"shape": [10**13]}
    for kind in (b"__ndarray__", b"__npgeneric__"):
        with pytest.raises(ValueError, match="not a message"):
            unpack(msgpack.packb({kind: True, **fields}))


def test_text_without_a_letter_is_not_sent() -> None:
    with pytest.raises(ValueError, match="dtype <U0 are not sent or taken"):
        pack({"x": np.ndarray((3,), "<U0")})


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="a set cannot be sent"):
        pack({"x": {1, 2}})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        pack({"x": 1}) + b"\x00",
        b"GET / HTTP/1.1\r\n",
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"dtype": "<f8", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"dtype": "nonsense", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": ["a"]}),
        msgpack.packb({b"__npgeneric__": True, b"data": "a", b"dtype": "<f4"}),
        msgpack.packb({b"__npgeneric__": True, b"data": [1.0, 2.0], b"dtype": "<f4"}),
    ],
)
def test_what_is_no_message_is_a_value_error(data: Any) -> None:
    with pytest.raises(ValueError, match="not a message"):
        unpack(data)


def header(count: int) -> bytes:
    """Announces a list of so many items."""
    return b"\xdd" + count.to_bytes(4, "big")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header(2**32 - 1), "exceeds max_array_len"),
        (header(16_000) * 1000, "incomplete input"),
        (b"\x91" * 100_000, "StackError|nested"),
        (header(16_000) + (header(16_000) + b"\x90" * 16_000) * 2, "more lists, dicts or items than a message has"),
        (header(16_000) + (header(16_000) + b"\xc0" * 16_000) * 20, "more lists, dicts or items than a message has"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "extension 5 has no meaning"),
        (
            msgpack.packb({b"__npgeneric__": True, b"data": 10**9, b"dtype": "|S5"}),
            r"a scalar of \|S5 whose value is a",
        ),
        (msgpack.packb({b"__npgeneric__": True, b"data": "1e999", b"dtype": "<f8"}), "a scalar of float64 whose"),
    ],
)
def test_small_messages_that_would_take_much_memory_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unpack(data)
