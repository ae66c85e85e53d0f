"""Requests that a policy server should refuse for what they hold: messages of its WebSocket, bodies of its HTTP.

Every kind is a function (random, target) -> bytes, drawn anew each time.
"""

import base64
import gzip
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack
import numpy as np
from serving.malformed_requests import Making, Target

from prismatic.serving import json_arrays
from prismatic.serving.wire import pack


def wrong_pictures(random: Random) -> Any:
    side = random.randrange(1, 40)
    draw = np.random.default_rng(random.getrandbits(32))
    shape = random.choice(
        [
            (side,),
            (side, 3),
            (side, side, 1),
            (side, side, 4),
            (3, side, side),
            (0, 0, 3),
            (side, 0, 3),
            (1, side, side, 3),
            (side, side, 3, 1),
            (5000, 1, 3),
            (2100, 2100, 3),
            (),
        ]
    )
    kinds = ["u1", "i8", "f4", "f8", "?", "S3", "U3"]
    wrong = np.zeros(shape, random.choice(kinds)) if random.random() < 0.5 else draw.random((side, side, 3))
    plain = [None, True, 7, -1.5, "picture", "", [], {}, [[1]], [[[256, 0, 0]]], [[["a", "b", "c"]]], {"a": {}}]
    return random.choice([wrong, random.choice(plain)])


def wrong_states(random: Random) -> Any:
    letters = ["x" * 100_000, *[""] * 7]
    return random.choice(
        [
            None,
            True,
            0,
            "state",
            "",
            [],
            {},
            [1, 2],
            letters,
            ["1"] * 8,
            [None] * 8,
            [[0.0] * 8, [0.0]],
            np.zeros(7),
            np.zeros((8, 8)),
            np.full(8, np.nan),
            np.array([np.inf] + [0.0] * 7),
            np.zeros(8, "S4"),
            np.zeros(8, "?"),
            np.zeros(0),
            np.float64(3.0),
            [letters] * 8,
            [2**63] * 9,
            np.zeros((1, 1, 8)),
        ]
    )


WRONG: dict[str, Callable[[Random], Any]] = {
    "instruction": lambda r: r.choice(
        [
            None,
            5,
            0.5,
            False,
            [],
            {},
            "",
            "  \n ",
            "a\x00b",
            "bell\x07",
            "\x1b[31m",
            "x" * 3000,
            "é" * 1500,
            np.zeros(3),
        ]
    ),
    "seed": lambda r: r.choice([-1, 1.5, "1", True, 2**63, [], {}, "x" * 10_000]),
    "session": lambda r: r.choice([5, "x" * 200, "a\nb", [], {}, True, "\x00", np.zeros(2)]),
    "query": lambda r: r.choice([-1, "0", 1.5, True, 2**60, [], {}]),
    "id": lambda r: r.choice([1.5, [], {}, "x" * 200, True, 2**64 - 1, "\x7f", np.zeros(1)]),
}


def wrong_request(random: Random, target: Target, protocol: str) -> Any:
    """A request with one thing wrong with it."""
    request, names = target.request(random, protocol), target.info["requests"][protocol]
    what = random.choice(["camera", "state", *WRONG, "lacking", "another", "whole"])
    if what == "camera":
        request[random.choice(names["cameras"])] = wrong_pictures(random)
    elif what == "state":
        request[names["state"]] = wrong_states(random)
    elif what == "lacking":
        del request[random.choice(list(request))]
    elif what == "another":
        return {random.choice(["observation/" + key, key.upper(), key + " ", ""]): v for key, v in request.items()}
    elif what == "whole":
        return random.choice([None, True, 7, 0.5, "request", [], {}, [request], {"a": request}, [None] * 1000])
    else:
        request[names["instruction"] if what == "instruction" else what] = WRONG[what](random)
    return request


def wrong_array(random: Random) -> dict[str, Any]:
    """An array, in either format's words, that cannot be one, or that would be too large."""
    dtype = random.choice(
        [
            "O",
            "|V8",
            "M8[s]",
            "c16",
            "f8,f8",
            "<U999999999",
            "|S999999999",
            "x" * 100_000,
            "",
            "u1" * 50,
            "(9,9)f8",
            None,
            5,
            [],
            "\u202e",
            "|u1",
            "|u1",
            "|u1",
            "<f8",
        ]
    )
    shape = random.choice(
        [
            [-1],
            [-4, -768],
            [2**40],
            [2**31] * 8,
            [1.5],
            ["a"],
            [["a"], 10**9],
            ["x" * 1000, 10**7],
            None,
            [[0], 10**9],
            [1] * 100,
            12288,
            {},
            [True],
            [2**62] * 1000,
            "64",
            [0, 2**60],
            [],
        ]
    )
    return {"dtype": dtype, "shape": shape, "data": random.choice([b"", bytes(8), bytes(12288)])}


def as_msgpack(value: Any) -> bytes:
    """Arrays as ours, everything else as msgpack has it."""
    return pack(value)


def array_in_msgpack(random: Random, target: Target) -> bytes:
    made = wrong_array(random)
    data: Any = random.choice([made["data"], made["data"], "text", [], {}, None, 7])
    marks = random.choice([{b"__ndarray__": True}, {b"__ndarray__": True}, {b"__npgeneric__": True}])
    array = {**marks, b"data": data, b"dtype": made["dtype"], b"shape": made["shape"]}
    if random.random() < 0.2:
        del array[random.choice([b"data", b"dtype", b"shape"])]
    camera = target.info["requests"]["websocket"]["cameras"][0]
    request = {key: packed_array(value) for key, value in target.request(random).items()}
    return msgpack.packb({**request, camera: array})


def packed_array(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def array_in_json(random: Random, target: Target) -> bytes:
    made = wrong_array(random)
    data: Any = base64.b64encode(made["data"]).decode()
    data = random.choice([data, data, "!!!", "AAA", "é", 7, None, [], "\ud800"])
    words = random.choice([made["dtype"], made["dtype"], "\ud800", "\ud800" * 1000])
    array = {"__numpy__": data, "dtype": words, "shape": made["shape"]}
    request = json.loads(json_arrays.dumps(target.request(random, "http")))
    return json.dumps({**request, target.info["requests"]["http"]["cameras"][0]: array}).encode()


def cut(random: Random, whole: bytes) -> bytes:
    return whole[: random.randrange(len(whole))]


# -- What WebSocket messages hold

MESSAGES: dict[str, Making] = {
    "fields": lambda r, t: as_msgpack(wrong_request(r, t, "websocket")),
    "arrays": array_in_msgpack,
    "noise": lambda r, _: r.randbytes(r.choice([0, 1, 10, 1000, 100_000])),
    "cut short": lambda r, t: cut(r, pack(t.request(r))),
    "more behind": lambda r, t: pack(t.request(r)) + r.randbytes(9),
    "deep": lambda r, _: r.choice([b"\x91", b"\x81\xa1a"]) * r.choice([500, 5000, 500_000]) + b"\xc0",
    "wide": lambda r, _: b"\xdd" + struct.pack("!I", 2_000_000) + r.choice([b"\x90", b"\x80", b"\xc0"]) * 2_000_000,
    "wide twice": lambda r, _: b"\x9f" + (b"\xdc\x40\x00" + b"\x90" * 16_384) * 15,
    "extensions": lambda r, _: msgpack.packb({"prompt": msgpack.ExtType(r.randrange(128), r.randbytes(8))}),
    "times": lambda r, _: b"\x81\xa1a" + r.choice([b"\xd6\xff" + bytes(4), b"\xd7\xff" + b"\xff" * 8]),
    "declared": lambda r, _: (
        r.choice([b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9"]) + b"\xff\xff\xff\xfe" + r.randbytes(9)
    ),
    "keys": lambda r, _: msgpack.packb({r.choice([1, None, True, 0.5, (1, 2)]): 1}),
    "no text": lambda r, _: b"\x81\xa3" + r.choice([b"\xff\xfe\xfd", b"\xed\xa0\x80"]) + b"\xc0",
    "json": lambda r, t: json_arrays.dumps(t.request(r)).encode(),
    "pickle": lambda r, _: b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93.",
}

# -- What bodies hold

BODIES: dict[str, Making] = {
    "fields": lambda r, t: lenient_json(wrong_request(r, t, "http")),
    "arrays": array_in_json,
    "noise": lambda r, _: r.randbytes(r.choice([0, 1, 10, 1000, 100_000])),
    "cut short": lambda r, t: cut(r, json_arrays.dumps(t.request(r, "http")).encode()),
    "more behind": lambda r, t: json_arrays.dumps(t.request(r, "http")).encode() + b"x",
    "deep": lambda r, _: r.choice([b"[", b'{"a":']) * r.choice([500, 5000, 200_000]),
    "wide": lambda r, _: b"[" + r.choice([b"[],", b"{},", b"0,"]) * 1_100_000 + b"0]",
    "no numbers": lambda r, t: (
        b'{"state": [%s]}' % r.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000])
    ),
    "other text": lambda r, t: json_arrays.dumps(t.request(r, "http")).encode(
        r.choice(["utf-16", "utf-32", "utf-8-sig"])
    ),
    "lone surrogates": lambda r, t: json.dumps(
        {
            **json.loads(json_arrays.dumps(t.request(r, "http"))),
            r.choice(["instruction", "session", "id"]): "a\ud800" * 9,
        }
    ).encode(),
    "encoded wrongly": lambda r, _: json.dumps(
        {"encoded": r.choice([1, None, [], {}, "", "{", '{"encoded": "{}"}'])}
    ).encode(),
    "encoded and more": lambda r, t: json.dumps({"encoded": json_arrays.dumps(t.request(r, "http")), "a": 1}).encode(),
    "gzip": lambda r, t: gzip.compress(json_arrays.dumps(t.request(r, "http")).encode()),
    "bomb": lambda r, _: gzip.compress(bytes(20_000_000), 9),
    "msgpack": lambda r, t: pack(t.request(r, "http")),
}


def lenient_json(value: Any) -> bytes:
    """Arrays as json_numpy's, NaN as it is written wrongly."""
    return json.dumps(value, default=json_arrays._encode).encode()
