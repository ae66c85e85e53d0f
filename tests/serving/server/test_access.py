"""Who may ask, and how much: keys, foreign pages, names, TLS, limits. All by real sockets."""

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import pytest
import requests
from served_policy import served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from prismatic.policy import Policy
from prismatic.serving.server import run
from prismatic.serving.server.run import PolicyServer
from prismatic.serving.settings import Secrets, ServerConfig, check, is_this_machine, read_secrets
from prismatic.serving.wire import pack, unpack

Observe = Callable[[int], dict[str, Any]]
KEY = "correct-horse-battery"
HEADER = {"Authorization": f"Api-Key {KEY}"}
ROUTES = ("/", "/info", "/metrics", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def locked(policy: Policy) -> Iterator[PolicyServer]:
    with served(policy, api_key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def unlocked(policy: Policy) -> Iterator[PolicyServer]:
    with served(policy, allowed_hosts="robot.example") as server:
        yield server


def handshake(server: PolicyServer, path: str = "", **headers: str) -> int:
    """101, or the status that refused it."""
    origin = headers.pop("Origin", None)
    try:
        with connect(server.url + path, additional_headers=headers, origin=origin, compression=None):  # type: ignore[arg-type]
            return 101
    except InvalidStatus as error:
        return error.response.status_code


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_but_the_health_check_asks_for_the_key(locked: PolicyServer, path: str) -> None:
    for headers in (
        {},
        {"Authorization": f"Api-Key {KEY}x"},
        {"Authorization": f"Bearer {KEY}"},
        {"Cookie": f"a={KEY}"},
    ):
        refused = requests.get(locked.http_url + path, headers=headers)
        assert refused.status_code == 401 and set(refused.json()) == {"error"} and KEY not in refused.text
        assert refused.headers["WWW-Authenticate"] == "Api-Key"
        assert handshake(locked, path, **headers) == 401
    assert requests.post(locked.http_url + path).status_code == 401
    assert requests.get(locked.http_url + path, headers=HEADER).status_code in (200, 404)
    assert handshake(locked, path, **HEADER) == 101
    assert requests.get(locked.http_url + "/healthz").text == "OK\n"


def test_a_browser_shows_the_key_once(locked: PolicyServer) -> None:
    assert requests.get(f"{locked.http_url}/info?key=wrong").status_code == 401
    browser = requests.Session()
    shown = browser.get(f"{locked.http_url}/info?key={KEY}&a=b", allow_redirects=False)
    assert shown.status_code == 303 and shown.headers["Location"] == "/info?a=b"
    cookie = shown.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and KEY not in cookie
    assert browser.get(f"{locked.http_url}/info").json()["server"] == "lightvla"
    assert handshake(locked, Cookie=cookie.partition(";")[0]) == 101
    others = f'theme={{"dark": 1}}; {cookie.partition(";")[0]}; a b=1'  # of other servers on this machine
    assert handshake(locked, Cookie=others) == 101
    assert cookie.startswith(f"lightvla_key_{locked.port}=")  # beside those of servers with other keys on this host
    # No open door: an address that begins with slashes stays on this server.
    led = requests.get(f"{locked.http_url}//elsewhere.example/?key={KEY}", allow_redirects=False)
    assert led.headers["Location"] == "/elsewhere.example/"
    assert requests.post(f"{locked.http_url}/act?key={KEY}").status_code == 401


def test_pages_of_other_origins_may_not_ask(locked: PolicyServer, unlocked: PolicyServer) -> None:
    for server, key in ((locked, HEADER), (unlocked, {})):
        own = server.http_url
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "file://"):
            assert requests.get(f"{own}/info", headers={"Origin": origin, **key}).status_code == 403
            assert requests.post(f"{own}/act", headers={"Origin": origin, **key}).status_code == 403
            assert handshake(server, Origin=origin, **key) == 403
        assert requests.get(f"{own}/info", headers={"Origin": own, **key}).status_code == 200
        assert handshake(server, Origin=own, **key) == 101
    assert requests.get(f"{unlocked.http_url}/info", headers={"Origin": "https://robot.example"}).status_code == 200


def test_a_server_without_a_key_answers_to_its_own_names(locked: PolicyServer, unlocked: PolicyServer) -> None:
    """Else a page of evil.example, whose name points to 127.0.0.1 by now, might ask from inside a browser here."""
    for host, status in {
        "evil.example": 403,
        "127.0.0.1.evil.example:80": 403,
        "localhost:9": 200,
        "[::1]": 200,
    }.items():
        assert requests.get(f"{unlocked.http_url}/info", headers={"Host": host}).status_code == status
    assert requests.get(f"{unlocked.http_url}/info", headers={"Host": "robot.example"}).status_code == 200
    assert requests.get(f"{locked.http_url}/info", headers={"Host": "anything.example", **HEADER}).status_code == 200


def test_bodies_and_headers_have_limits(policy: Policy) -> None:
    with served(policy, max_message_mb=0.1) as server:
        large = b" " * 200_000
        for body in (large, iter([large])):  # the second says no length
            refused = requests.post(f"{server.http_url}/act", data=body)
            assert refused.status_code == 413 and "more than 0.1 MB (--max_message_mb)" in refused.json()["error"]
        for headers in ({"X": "x" * 100_000}, {"X": "x" * 9000}, {f"X{number}": "x" for number in range(130)}):
            assert handshake(server, **headers) in (400, 431)
        long = requests.get(f"{server.http_url}/healthz", headers={"X": "x" * 100_000})
        assert long.status_code in (400, 431)  # the first where it came in several pieces
        assert requests.get(f"{server.http_url}/healthz").status_code == 200


def test_who_asks_too_often_is_told_so(policy: Policy, observe: Observe) -> None:
    request = {**observe(0), "prompt": "go"}
    with served(policy, max_rate=0.01) as server:
        with connect(server.url, compression=None) as connection:
            answers = []
            connection.recv(5)
            for _ in range(2):
                connection.send(pack(request))
                answers.append(connection.recv(5))
            assert isinstance(answers[0], bytes) and isinstance(answers[1], str)
            assert "more than 0.01 requests a second (--max_rate)" in answers[1]
        body = json_numpy.dumps({**observe(0), "instruction": "go"})
        statuses = [requests.post(f"{server.http_url}/act", data=body).status_code for _ in range(2)]
        assert statuses == [200, 429]


def test_clients_beyond_the_limit_are_refused_and_idle_ones_let_go(policy: Policy) -> None:
    with served(policy, max_connections=1, idle_s=0.3) as server:
        with connect(server.url, compression=None) as connection:
            connection.recv(5)
            assert handshake(server) == 429
            with pytest.raises(ConnectionClosed):
                connection.recv(5)
            assert connection.close_code == 1001 and connection.close_reason == "idle"
        assert handshake(server) == 101


def test_connections_that_bring_no_request_are_let_go(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_REQUEST_S", 0.2)
    monkeypatch.setattr(run, "_SPARE_CONNECTIONS", 2)
    with served(policy, max_connections=1) as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address) as silent, socket.create_connection(address) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-")
            with socket.create_connection(address), socket.create_connection(address) as fourth:
                fourth.settimeout(5)
                with pytest.raises(ConnectionResetError):
                    raise ConnectionResetError if fourth.recv(1) == b"" else AssertionError
            for connection in (silent, slow):
                connection.settimeout(5)
                assert connection.recv(1) == b""
        with requests.Session() as steady:  # one that asks again and again is not
            for _ in range(4):
                time.sleep(0.1)
                assert steady.get(f"{server.http_url}/healthz").status_code == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that signs itself, for 127.0.0.1, and its key."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "certificate.pem", folder / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=127.0.0.1"
    command = [
        openssl,
        *words.split(),
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(made),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return made, key


def test_tls(policy: Policy, observe: Observe, certificate: tuple[Path, Path]) -> None:
    files = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
    with served(policy, api_key=KEY, **files) as server:
        assert server.url.startswith("wss://") and server.http_url.startswith("https://")
        shown = requests.get(f"{server.http_url}/info?key={KEY}", verify=certificate[0], allow_redirects=False)
        assert shown.status_code == 303 and "Secure" in shown.headers["Set-Cookie"]
        context = ssl.create_default_context(cafile=certificate[0])
        with connect(server.url, ssl=context, additional_headers=HEADER, compression=None) as connection:
            connection.recv(5)
            connection.send(pack({**observe(0), "prompt": "go"}))
            answer = connection.recv(5)
        assert isinstance(answer, bytes) and np.isfinite(unpack(answer)["actions"]).all()


def config(**flags: Any) -> ServerConfig:
    return ServerConfig(pretrained_checkpoint="x", **flags)


def test_certificates_that_cannot_be_used_are_refused(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    made, key = certificate
    check(config(ssl_certfile=made, ssl_keyfile=key))
    (tmp_path / "other.pem").write_text("no key")
    for flags, words in (
        ({"ssl_certfile": made}, "--ssl_certfile .* needs --ssl_keyfile beside it"),
        ({"ssl_keyfile": key}, "--ssl_keyfile .* needs --ssl_certfile beside it"),
        ({"ssl_certfile": made, "ssl_keyfile": tmp_path / "no.pem"}, "--ssl_keyfile .*: there is no such file"),
        ({"ssl_certfile": made, "ssl_keyfile": tmp_path / "other.pem"}, "cannot be used"),
    ):
        with pytest.raises(ValueError, match=words):
            check(config(**flags))


def test_an_address_that_others_reach_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTVLA_API_KEY", raising=False)
    assert all(map(is_this_machine, ("127.0.0.1", "127.8.9.1", "::1", "localhost")))
    assert not any(map(is_this_machine, ("0.0.0.0", "::", "192.168.1.3", "robot.local", "")))
    assert read_secrets(config()) == Secrets()
    with pytest.raises(ValueError, match="--host 0.0.0.0 can be reached from other machines, and there is no key"):
        read_secrets(config(host="0.0.0.0"))
    file = tmp_path / "key.txt"
    for text, words in (("", "is empty"), ("short", "has 5 characters"), ("x" * 20 + " \u00e9", "printable ASCII")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_secrets(config(api_key_file=file))
    file.write_text(f"{KEY}\n")
    monkeypatch.setenv("LIGHTVLA_API_KEY", "another-key-of-the-environment")
    assert read_secrets(config(host="0.0.0.0", api_key_file=file)).api_key == KEY
    assert read_secrets(config(host="0.0.0.0")).api_key == "another-key-of-the-environment"
    assert KEY not in repr(read_secrets(config(api_key_file=file)))
    with pytest.raises(ValueError, match="--api_key_file .*no.txt cannot be read .No such file or directory.;"):
        read_secrets(config(api_key_file=tmp_path / "no.txt"))
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="--api_key_file .* cannot be read .it is no text."):
        read_secrets(config(api_key_file=file))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"pretrained_checkpoint": ""}, "--pretrained_checkpoint is missing"),
        ({"convention": "pi"}, "--convention pi: expected one of lightvla, openpi"),
        ({"out_of_bounds": "warn"}, "--out_of_bounds warn: expected one of flag, clip, allow"),
        ({"port": 70000}, "--port 70000: expected 0 to 65535"),
        ({"max_batch_size": 0}, "--max_batch_size 0: expected a number from 1"),
        ({"batch_wait_ms": float("nan")}, "--batch_wait_ms nan: expected a number from 0"),
        ({"max_message_mb": 0.0}, "--max_message_mb 0.0: expected a number above 0"),
    ],
)
def test_flags_that_cannot_be_meant(flags: dict[str, Any], words: str) -> None:
    check(config())
    with pytest.raises(ValueError, match=words):
        check(ServerConfig(**{"pretrained_checkpoint": "x", **flags}))
