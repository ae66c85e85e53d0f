"""Attacks a policy server of this machine by requests that it must refuse, and says what it should not have done.

    python tests/serving/malformed.py 8000 --number 10000 --seed 3

Each request must be answered by a 4xx, by a text frame, or by the end of the connection, in time, without a traceback
or a path of the server's files, and never by actions. The same seed and number make the same request.
"""

import argparse
import json
import socket
import struct
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from serving.malformed_policy_requests import BODIES, MESSAGES
from serving.malformed_requests import FRAMES, HANDSHAKES, HEADS, Target, frame, get, post, upgrade

PATIENCE_S = 60.0
"""How long an answer may take; the server gives up earlier on what does not come."""
MOST_BYTES = 4000
"""Of an answer to something malformed, headers included: what came is not sent back."""
LEAKS = (b"Traceback", b'File "', b"site-packages", b".py", b"prismatic/", b"<module>", b"object at 0x", b" broke (")


@dataclass
class Outcome:
    """What became of one request.

    Attributes:
        kind: of the request.
        what: an HTTP status, `text <close code>`, `closed <close code>`, `closed` or `left`.
        fault: what the server should not have done; None: nothing.
    """

    kind: str
    what: str
    fault: str | None = None


@dataclass
class Attack:
    """Requests of one seed, and what became of them."""

    target: Target
    seed: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, numbers: range) -> None:
        """One request after another; every kind comes about equally often."""
        kinds = list(all_kinds(self.target))
        for number in numbers:
            group, name, attempt = kinds[number % len(kinds)]
            kind = f"{group}: {name}"
            try:
                outcome = attempt(Random(f"{self.seed} {number}"))
            except TimeoutError:
                outcome = Outcome(kind, "nothing", f"no answer within {PATIENCE_S:g} s")
            except ConnectionError:
                outcome = Outcome(kind, "closed")
            outcome.kind = kind
            if outcome.fault:
                outcome.fault = f"{kind} (number {number}): {outcome.fault}"
            self.outcomes.append(outcome)

    @property
    def faults(self) -> list[str]:
        return [outcome.fault for outcome in self.outcomes if outcome.fault]

    def table(self) -> str:
        """How often what became of each kind, in lines."""
        kinds: dict[str, Counter[str]] = {}
        for outcome in self.outcomes:
            kinds.setdefault(outcome.kind, Counter())[outcome.what] += 1
        lines = (f"{kind:38} {', '.join(f'{n} x {what}' for what, n in c.items())}" for kind, c in kinds.items())
        return "\n".join(lines)


def look_at(port: int, key: str | None = None) -> Target:
    """The server that listens there."""
    headers = {} if key is None else {"Authorization": f"Api-Key {key}"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/info", headers=headers)) as answer:
        return Target(port, json.load(answer), key)


def all_kinds(target: Target) -> Iterator[tuple[str, str, Callable[[Random], Outcome]]]:
    """Group, name, and what sends one such request."""
    for name, making in MESSAGES.items():
        yield "message", name, lambda r, making=making: _converse(target, frame(making(r, target)))
    for name, making in FRAMES.items():
        yield "frames", name, lambda r, making=making: _converse(target, making(r, target))
    for name, making in HANDSHAKES.items():
        yield "handshake", name, lambda r, making=making: _ask(target, making(r, target))
    for name, making in BODIES.items():
        yield "body", name, lambda r, making=making: _ask(target, post(target, making(r, target)))
    for name, making in HEADS.items():
        yield "head", name, lambda r, making=making: _ask(target, making(r, target))
    for name, leaving in _LEAVING.items():
        yield "left", name, lambda r, leaving=leaving: leaving(r, target)
    for name, strange in (_KEYS if target.key else _HOSTS).items():
        yield "stranger", name, lambda r, strange=strange: _ask(target, strange(r, target))


# -- Sending and judging


def _ask(target: Target, request: bytes) -> Outcome:
    """Send a whole HTTP request, read until the answer's end."""
    with socket.create_connection(("127.0.0.1", target.port), PATIENCE_S) as connection:
        with suppress(ConnectionError):  # refused before it had all come; the answer may be there
            connection.sendall(request)
        answer = _read_http(connection)
    if not answer:
        return Outcome("", "closed")
    status = answer[9:12].decode(errors="replace")
    fault = _leak(answer)
    if not answer.startswith(b"HTTP/1.1 "):
        fault = f"answered by {answer[:60]!r}"
    elif not status.startswith("4"):
        fault = f"answered {status}: {answer[-200:]!r}"
    return Outcome("", status, fault)


def _read_http(connection: socket.socket) -> bytes:
    """Until its length is there, or the connection ends, in whichever way."""
    answer = b""
    while len(answer) < 100_000:
        head, found, body = answer.partition(b"\r\n\r\n")
        if found and head.startswith(b"HTTP/1.1 101"):
            return answer
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if found and lengths and len(body) >= int(lengths[0].split(b":")[1]):
            return answer
        try:
            part = connection.recv(65_536)
        except ConnectionError:
            return answer
        if not part:
            return answer
        answer += part
    return answer


def _converse(target: Target, sent: bytes) -> Outcome:
    """Open a WebSocket properly, send bytes, read to the end of the connection."""
    with socket.create_connection(("127.0.0.1", target.port), PATIENCE_S) as connection:
        connection.sendall(upgrade(target, b"Sec-WebSocket-Extensions: permessage-deflate\r\n"))
        stream = connection.makefile("rb")
        head = b"".join(iter(stream.readline, b"\r\n"))
        if not head.startswith(b"HTTP/1.1 101"):
            return Outcome("", head[9:12].decode(errors="replace"), f"not even greeted: {head[:60]!r}")
        greeting = next(_frames(stream))
        found = []
        with suppress(ConnectionError):
            connection.sendall(sent)
        with suppress(ConnectionError):
            found.extend(_frames(stream))
    if greeting[0] != 2 or b"deflate" in head.lower():
        return Outcome("", "greeting", f"greeted by opcode {greeting[0]}, {head!r}")
    return _judge(found)


def _frames(stream) -> Iterator[tuple[int, bytes]]:
    """(opcode, payload) of a server's frames until the closing one; EOF ends them."""
    while len(head := stream.read(2)) == 2:
        size = head[1]
        if size >= 126:
            size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
        yield head[0] & 15, stream.read(size)
        if head[0] & 15 == 8:
            return


def _judge(found: list[tuple[int, bytes]]) -> Outcome:
    texts = [payload for opcode, payload in found if opcode == 1]
    code = next((struct.unpack("!H", payload[:2])[0] for opcode, payload in found if opcode == 8 and payload), "")
    fault = _leak(b"".join(payload for _, payload in found if _ != 10))
    if any(opcode == 2 for opcode, _ in found):
        fault = "answered by actions"
    elif len(texts) > 1 or (texts and code != 1011):
        fault = f"{len(texts)} texts, then {code}"
    elif texts and not texts[0].strip():
        fault = "a text without words"
    return Outcome("", f"{'text' if texts else 'closed'} {code}".strip(), fault)


def _leak(answer: bytes) -> str | None:
    if len(answer) > MOST_BYTES:
        return f"{len(answer)} bytes of answer: {answer[:200]!r}"
    told = [word for word in LEAKS if word in answer]
    return f"told {told}: {answer[-500:]!r}" if told else None


# -- Clients that go, or do not go on


def _leave(target: Target, sent: bytes, how: str, read: bool = False) -> Outcome:
    """Send a part, then end the connection: `half` closes this side and reads on, `reset` drops it, `close` closes."""
    with socket.create_connection(("127.0.0.1", target.port), PATIENCE_S) as connection:
        connection.sendall(sent)
        if how == "half":
            connection.shutdown(socket.SHUT_WR)
            answer = _read_to_end(connection)
            return Outcome("", "left", _leak(answer))
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return Outcome("", "left")


def _read_to_end(connection: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionError):
        while part := connection.recv(65_536):
            answer += part
    return answer[-MOST_BYTES:] if b"HTTP/1.1 101" in answer[:20] else answer  # the greeting is long, and right


def _way(random: Random) -> str:
    return random.choice(["half", "reset", "close"])


_LEAVING: Mapping[str, Callable[[Random, Target], Outcome]] = {
    "in the head": lambda r, t: _leave(t, get(t, b"/info")[: r.randrange(60)], _way(r)),
    "in the body": lambda r, t: _leave(t, post(t, bytes(1000))[: -r.randrange(1, 1000)], _way(r)),
    "behind a whole request": lambda r, t: _leave(t, post(t, b"{"), r.choice(["reset", "close"])),
    "in the handshake": lambda r, t: _leave(t, upgrade(t)[: r.randrange(150)], _way(r)),
    "behind the handshake": lambda r, t: _leave(t, upgrade(t), _way(r)),
    "in a frame": lambda r, t: _leave(t, upgrade(t) + frame(bytes(1000))[: r.randrange(1000)], _way(r)),
    "in a message": lambda r, t: _leave(t, upgrade(t) + frame(bytes(1000), first=0), _way(r)),
}


# -- Strangers: where there is a key, and where there is none


def _without_key(target: Target, path: bytes, extra: bytes = b"") -> bytes:
    return get(Target(target.port, target.info), path, extra)


_KEYS: Mapping[str, Callable[[Random, Target], bytes]] = {
    "no key": lambda r, t: _without_key(
        t,
        r.choice(
            [
                b"/",
                b"/info",
                b"/metrics",
                b"/openapi.json",
                b"/healthz/",
                b"//healthz",
                b"/healthz/../info",
                b"/%2e/healthz?",
                b"/info?/healthz",
            ]
        ),
    ),
    "header": lambda r, t: _without_key(
        t,
        b"/info",
        b"Authorization: "
        + r.choice(
            [
                b"",
                b"Api-Key",
                b"Api-Key ",
                b"Bearer x",
                b"Api-Key \xe9\xff",
                b"Api-Key " + b"a" * 5000,
                b"Api-Key \xc3\xa9",
                (t.key or "").encode(),
                b"Basic " + (t.key or "").encode(),
                b"Api-Key " + (t.key or "")[:-1].encode(),
            ]
        )
        + b"\r\n",
    ),
    "address": lambda r, t: _without_key(
        t,
        b"/info?"
        + r.choice(
            [
                b"key=",
                b"key=%00",
                b"key=%ff",
                b"key=x&key=" + (t.key or "").encode(),
                b"KEY=" + (t.key or "").encode(),
                b"key",
                b"&".join([b"a=b"] * 3000),
                b"key=%0d%0aSet-Cookie:x",
                b"key[]=" + (t.key or "").encode(),
            ]
        ),
    ),
    "cookie": lambda r, t: _without_key(
        t,
        b"/info",
        b"Cookie: lightvla_key_%d=" % t.port
        + r.choice([b"", b"x", (t.key or "").encode(), b'"', b"\xff", b"a" * 5000, b";" * 5000, b'"\\377"'])
        + b"\r\n",
    ),
    "handshake": lambda r, t: upgrade(
        Target(t.port, t.info),
        b"",
        r.choice(
            [
                b"GET / HTTP/1.1",
                b"GET /info HTTP/1.1",
                b"GET /healthz/ HTTP/1.1",
                b"GET /?key=%s HTTP/1.1" % (t.key or "").encode(),
            ]
        ),
    ),
}
_HOSTS: Mapping[str, Callable[[Random, Target], bytes]] = {
    "host": lambda r, t: get(t, b"/info").replace(
        b"Host: 127.0.0.1",
        b"Host: "
        + r.choice(
            [
                b"evil.example",
                b"127.0.0.1.evil.example",
                b"[::1",
                b"127.0.0.1@evil.example",
                b"\xe9",
                b"localhost.",
                b"0x7f.1",
            ]
        ),
    ),
    "host of a handshake": lambda r, t: upgrade(t).replace(b"Host: 127.0.0.1", b"Host: evil.example"),
}


def main() -> int:
    """For the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int, help="of a server on this machine")
    parser.add_argument("--number", type=int, default=1000, help="of requests")
    parser.add_argument("--first", type=int, default=0, help="the first one's number")
    parser.add_argument("--seed", type=int, default=0, help="of what they hold")
    parser.add_argument("--key", default=None, help="of the server")
    flags = parser.parse_args()
    attack = Attack(look_at(flags.port, flags.key), flags.seed)
    attack.run(range(flags.first, flags.first + flags.number))
    print(attack.table(), *attack.faults, sep="\n")
    return 1 if attack.faults else 0


if __name__ == "__main__":
    sys.exit(main())
