"""Arrays that would take more memory than a message has, or that no answer could quote."""

import json
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest

from prismatic.serving import json_arrays
from prismatic.serving.server.payloads import Reader, Refusal
from prismatic.serving.settings import ServerConfig
from prismatic.serving.wire import unpack
from prismatic.vla.robots import LIBERO

MB = 2**20
READER = Reader(LIBERO, 2, True, ServerConfig())


def request(**changes: Any) -> dict[str, Any]:
    picture = np.zeros((8, 8, 3), np.uint8)
    return {"full_image": picture, "wrist_image": picture, "state": np.zeros(8), "prompt": "go", **changes}


@pytest.mark.parametrize(
    "shape", [[[0], 10**8], ["x" * 1000, 10**6], [-1, -8], [2**40], [1] * 9, [True], [8.0], 8, None, {}, "8"], ids=str
)
def test_a_shape_is_a_short_list_of_whole_numbers(shape: Any) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match="shape"):
        unpack(msgpack.packb({b"__ndarray__": True, b"data": bytes(8), b"dtype": "|u1", b"shape": shape}))
    with pytest.raises(ValueError, match="shape"):
        json_arrays.loads(json_arrays.dumps({"__numpy__": "AAAAAAAAAAA=", "dtype": "|u1", "shape": shape}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * MB


@pytest.mark.parametrize(
    "dtype", ["O", "<U999999999", "f8,f8", "x" * 100_000, "\ud800"], ids=lambda words: ascii(words)[:9]
)
def test_a_dtype_that_is_none_is_quoted_shortly(dtype: str) -> None:
    with pytest.raises(ValueError, match="dtype") as caught:
        json_arrays.loads(json.dumps({"__numpy__": "", "dtype": dtype, "shape": [0]}))
    assert len(str(caught.value)) < 200


def test_json_is_utf_8() -> None:
    text = '{"instruction": "fünf"}'
    assert json_arrays.loads(text.encode()) == json_arrays.loads(text) == {"instruction": "fünf"}
    for coding in ("utf-16", "utf-32"):
        with pytest.raises(ValueError, match="UTF-8"):
            json_arrays.loads(text.encode(coding))


def test_texts_among_numbers_are_refused_before_an_array_is_made() -> None:
    """Each would take the four million bytes of the longest one."""
    rows = ["x" * MB, *[""] * 10_000]
    for changes in (
        {"state": rows},
        {"full_image": rows},
        {"full_image": [[rows]]},
        {"wrist_image": [np.array(["a"])]},
    ):
        tracemalloc.start()
        with pytest.raises(Refusal, match="something else than numbers"):
            READER.read(request(**changes), READER.websocket, "me")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * MB


def test_a_picture_of_rows_has_the_limits_of_a_picture() -> None:
    rows = [np.zeros((5000, 3), np.uint8)]
    with pytest.raises(Refusal, match="at most 4096 pixels a side") as caught:
        READER.read(request(full_image=rows), READER.websocket, "me")
    assert caught.value.code == "too_large"


def test_nested_lists_are_still_a_picture_and_a_state() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    read = READER.read(request(full_image=picture.tolist(), state=[0.5] * 8), READER.websocket, "me")
    assert np.array_equal(read.observation["full_image"], picture)
    assert read.observation["state"].tolist() == [0.5] * 8


def test_a_refusal_can_be_sent_whatever_it_quotes() -> None:
    refusal = Refusal("bad_request", "\ud800" * 10_000)
    assert refusal.reason.encode() and len(refusal.reason) < 1000
