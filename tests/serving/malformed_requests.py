"""Requests that a policy server should refuse for how they are sent: frames, handshakes, HTTP's heads.

Every kind is a function (random, target) -> bytes, drawn anew each time.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from prismatic.serving.wire import pack

Making = Callable[[Random, "Target"], bytes]
UPGRADE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@dataclass(frozen=True)
class Target:
    """A server, and what its requests look like.

    Attributes:
        port: on this machine.
        info: of GET /info.
        key: what it wants to see, or None.
    """

    port: int
    info: dict[str, Any]
    key: str | None = None

    @property
    def head(self) -> bytes:
        """The headers that make a request one of a known client."""
        key = b"" if self.key is None else b"Authorization: Api-Key " + self.key.encode() + b"\r\n"
        return b"Host: 127.0.0.1:%d\r\n%s" % (self.port, key)

    def request(self, random: Random, protocol: str = "websocket") -> dict[str, Any]:
        """What the server would answer."""
        names, draw = self.info["requests"][protocol], np.random.default_rng(random.getrandbits(32))
        pictures = {camera: draw.integers(256, size=(32, 32, 3), dtype=np.uint8) for camera in names["cameras"]}
        state = {names["state"]: draw.uniform(-0.5, 0.5, self.info["robot"]["proprio_dim"])}
        return {**pictures, **state, names["instruction"]: "put the bowl on the plate"}


def upgrade(target: Target, extra: bytes = b"", line: bytes = b"GET /policy HTTP/1.1") -> bytes:
    """A handshake on a path that has no page, which a request that is no handshake after all would be given."""
    return line + b"\r\n" + target.head + UPGRADE + extra + b"\r\n"


def post(target: Target, body: bytes, extra: bytes = b"Content-Type: application/json\r\n") -> bytes:
    return (
        b"POST /act HTTP/1.1\r\n%sConnection: close\r\nContent-Length: %d\r\n%s\r\n" % (target.head, len(body), extra)
        + body
    )


def get(target: Target, path: bytes, extra: bytes = b"", method: bytes = b"GET") -> bytes:
    return b"%s %s HTTP/1.1\r\n%sConnection: close\r\n%s\r\n" % (method, path, target.head, extra)


def frame(payload: bytes, opcode: int = 2, first: int = 0x80, mask: bool = True, length: int | None = None) -> bytes:
    """One frame of a client: FIN and reserved bits in `first`, another `length` than the payload's if one is given."""
    size = len(payload) if length is None else length
    bit = 0x80 if mask else 0
    if size < 126:
        head = struct.pack("!BB", first | opcode, bit | size)
    elif size < 2**16:
        head = struct.pack("!BBH", first | opcode, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first | opcode, bit | 127, size)
    return head + (bytes(4) if mask else b"") + payload  # a mask of zeros changes nothing


# -- What frames can be wrong

FRAMES: dict[str, Making] = {
    "reserved bits": lambda r, _: frame(b"a", first=0x80 | r.choice([0x40, 0x20, 0x10])),
    "reserved opcode": lambda r, _: frame(b"a", opcode=r.choice([3, 4, 7, 11, 15])),
    "no mask": lambda r, t: frame(pack(t.request(r)), mask=False),
    "long control": lambda r, _: frame(bytes(126), opcode=r.choice([8, 9, 10])),
    "control in pieces": lambda r, _: frame(b"a", opcode=9, first=0),
    "goes on without beginning": lambda r, _: frame(b"a", opcode=0),
    "begins twice": lambda r, _: frame(b"a", first=0) + frame(b"a"),
    "no utf-8": lambda r, _: frame(r.choice([b"\xff", b"\xed\xa0\x80", b"\xc3"]), opcode=1),
    "text": lambda r, t: frame(r.choice([b"", b"hello", b"{}", b'{"prompt": 1}']), opcode=1),
    "text in pieces": lambda r, _: frame(b"h", opcode=1, first=0) + frame(b"i", opcode=0),
    "many pieces": lambda r, _: (
        frame(b"\x91", first=0) + frame(b"", opcode=0, first=0) * 5000 + frame(b"\xc1", opcode=0)
    ),
    "closing wrongly": lambda r, _: frame(r.choice([b"\0", b"\0\5", b"\3\xee", b"\3\xe8\xff"]), opcode=8),
    "too long": lambda r, t: frame(bytes(9), length=t.info["limits"]["message_bytes"] + 1),
    "longer than long": lambda r, _: frame(b"", length=r.choice([2**62, 2**63 - 1, 2**63, 2**64 - 1])),
    "too long in pieces": lambda r, t: (
        frame(bytes(2**20), first=0) + frame(b"", opcode=0, length=t.info["limits"]["message_bytes"])
    ),
    "compressed": lambda r, _: frame(b"\xc2\xc1\x01\x00" + bytes(50), first=0xC0),
    "many pings": lambda r, _: frame(b"ping", opcode=9) * 500 + frame(b"", opcode=1),
    "http": lambda r, t: get(t, b"/info"),
    "noise": lambda r, _: b"\x83" + r.randbytes(500),
}

# -- How connections can be opened

HANDSHAKES: dict[str, Making] = {
    "version": lambda r, t: upgrade(t).replace(b"Version: 13", b"Version: " + r.choice([b"8", b"", b"x", b"13, 8"])),
    "no key": lambda r, t: upgrade(t).replace(b"Sec-WebSocket-Key", b"X-Key"),
    "key": lambda r, t: upgrade(t).replace(b"dGhl", r.choice([b"@@@@", b"", b"dGhldGhl"])),
    "two keys": lambda r, t: upgrade(t, b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"),
    "method": lambda r, t: upgrade(t, line=r.choice([b"POST", b"PUT", b"HEAD", b"FOO"]) + b" / HTTP/1.1"),
    "many headers": lambda r, t: upgrade(
        t, b"".join(b"X-%d: a\r\n" % number for number in range(r.randrange(130, 400)))
    ),
    "long header": lambda r, t: upgrade(t, b"X: " + b"a" * r.randrange(9000, 30_000) + b"\r\n"),
    "long path": lambda r, t: upgrade(t, line=b"GET /" + b"a" * r.randrange(9000, 30_000) + b" HTTP/1.1"),
    "body": lambda r, t: upgrade(t, b"Content-Length: 5\r\n") + b"hello",
    "chunks": lambda r, t: upgrade(t, b"Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n",
    "origin": lambda r, t: upgrade(
        t, b"Origin: " + r.choice([b"http://evil.example", b"null", b"http://[", b"//"]) + b"\r\n"
    ),
    "extension": lambda r, t: upgrade(
        t, b"Sec-WebSocket-Extensions: a=" + r.choice([b"\x01", b"\x7f", b"\x00"]) + b"\r\n"
    ),
    "protocol": lambda r, t: upgrade(t, b"Sec-WebSocket-Protocol: " + r.choice([b"(", b'a"', b"a b"]) + b"\r\n"),
    "upgrade": lambda r, t: upgrade(t).replace(b"Upgrade: websocket", b"Upgrade: websocket, " + b"x" * 20),
}

# -- HTTP's heads


def raw_post(target: Target, headers: bytes, body: bytes) -> bytes:
    return b"POST /act HTTP/1.1\r\n" + target.head + headers + b"\r\n" + body


HEADS: dict[str, Making] = {
    "noise": lambda r, _: r.randbytes(200) + b"\r\n\r\n",
    "tls": lambda r, _: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + r.randbytes(200) + b"\r\n\r\n",
    "http/2": lambda r, _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(30),
    "versions": lambda r, t: get(t, b"/info").replace(b"HTTP/1.1", r.choice([b"HTTP/1.x", b"http", b""])),
    "no host": lambda r, t: get(t, b"/info").replace(b"Host", b"X-Host"),
    "two hosts": lambda r, t: get(t, b"/info", b"Host: evil.example\r\n"),
    "huge header": lambda r, t: get(t, b"/info", b"X: " + b"a" * r.choice([300_000, 900_000]) + b"\r\n"),
    "many headers": lambda r, t: get(t, b"/info", b"X-Y: z\r\n" * 60_000),
    "wrong header": lambda r, t: get(t, b"/info", r.choice([b"X\0: a\r\n", b"X: a\0b\r\n", b": a\r\n", b"X a\r\n"])),
    "paths": lambda r, t: get(
        t,
        r.choice(
            [
                b"/%00",
                b"/../../etc/passwd",
                b"/%2e%2e/%2e%2e/etc/passwd",
                b"/..\\..",
                b"//x/info",
                b"/info/",
                b"/INFO",
                b"/info%0d%0aX: y",
                b"/%ff%fe",
                b"/act/../info",
                b"*",
                b"/nothing?key=%00",  # "/" is the page, for whoever has no need of a key or sends the right one
                b"/" + b"a" * 20_000,
            ]
        ),
    ),
    "methods": lambda r, t: get(
        t,
        r.choice([b"/info", b"/metrics", b"/openapi.json"]),
        b"",
        r.choice([b"POST", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"CONNECT", b"OPTIONS", b"FOO"]),
    ),
    "act is posted": lambda r, t: get(t, b"/act", b"", r.choice([b"GET", b"PUT", b"DELETE", b"OPTIONS", b"HEAD"])),
    "lengths": lambda r, t: raw_post(
        t, b"Content-Length: %s\r\n" % r.choice([b"-1", b"1e3", b"+5", b"0x10", b"9" * 30, b"5, 6"]), b"hello"
    ),
    "two lengths": lambda r, t: raw_post(t, b"Content-Length: 5\r\nContent-Length: 6\r\n", b"hello!"),
    "too long": lambda r, t: raw_post(t, b"Content-Length: %d\r\n" % (t.info["limits"]["message_bytes"] + 1), b"a"),
    "length and chunks": lambda r, t: raw_post(
        t, b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\nGET /info HTTP/1.1\r\n\r\n"
    ),
    "chunks": lambda r, t: raw_post(
        t,
        b"Transfer-Encoding: chunked\r\n",
        r.choice(
            [b"zz\r\n", b"-1\r\n\r\n", b"5\r\nhelloooo\r\n", b"0;" + b"a" * 40_000, b"fffffffffffffffffffff\r\na"]
        ),
    ),
    "encodings": lambda r, t: raw_post(
        t,
        b"Transfer-Encoding: %s\r\n" % r.choice([b"gzip, chunked", b"identity", b"chunked, x"]),
        b"5\r\nhello\r\n0\r\n\r\n",
    ),
    "origins": lambda r, t: get(
        t, b"/info", b"Origin: " + r.choice([b"http://evil.example", b"null", b"file://", b"http://["]) + b"\r\n"
    ),
}
